"""Every kind of picture is decoded, or refused with a reason; nothing is fatal."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bootstrap.data.decode import BadPictureError, Region, decode_picture, decode_region
from bootstrap.data.skipped import SkippedPictures
from bootstrap.data.views import EvalView, TrainView, random_region, view_seed
from sparse_vlm.transform import ImageTransform, TransformConfig
from tests.bootstrap import picture_files as files

LIMIT = 80_000_000
VIEW = TrainView(TransformConfig(16))


@pytest.mark.parametrize("name", sorted(files.good_files()))
def test_unusual_pictures_are_decoded(name: str) -> None:
    data = files.good_files()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = decode_picture(data, LIMIT)
        view = VIEW(data, 3, 0)
    assert picture.mode == "RGB"
    assert view.shape == (3, 16, 16)
    assert torch.isfinite(view).all()


@pytest.mark.parametrize("name", sorted(files.bad_files()))
def test_bad_pictures_are_refused_with_the_reason(name: str) -> None:
    data, reason = files.bad_files()[name]
    for attempt in (lambda: decode_picture(data, LIMIT), lambda: VIEW(data, 0, 0)):
        with pytest.raises(BadPictureError) as caught:
            attempt()
        assert caught.value.reason == reason or not reason


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(files.good_files())),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=5),
)
def test_damage_anywhere_is_never_fatal(name: str, cut: float, flips: list[tuple[float, int]]) -> None:
    data = bytearray(files.good_files()[name])
    for place, change in flips:
        data[int(place * len(data))] ^= change
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shape = tuple(VIEW(bytes(data[: max(int(cut * len(data)), 1)]), 0, 0).shape)
        except BadPictureError:
            shape = (3, 16, 16)
        assert shape == (3, 16, 16)


def test_first_frame_of_an_animation_is_used() -> None:
    red, _, blue = np.asarray(decode_picture(files.animation(), LIMIT)).mean(axis=(0, 1))
    assert red > 200
    assert blue < 50


def test_deep_pictures_keep_their_range() -> None:
    grey = np.asarray(decode_picture(files.deep_grey(), LIMIT))[..., 0].astype(int)
    assert np.abs(grey - np.rint(np.linspace(0, 255, 480)).reshape(20, 24)).max() <= 1


def test_gigantic_jpeg_is_decoded_small_and_gigantic_progressive_one_is_not() -> None:
    picture = files.smooth(800, 600)
    limit = 800 * 600 // 16
    decoded = decode_picture(files.encode(picture, quality=95), limit)
    assert decoded.size == (200, 150)
    expected = picture.resize((200, 150), Image.Resampling.BOX)
    assert np.abs(np.asarray(decoded, dtype=float) - np.asarray(expected, dtype=float)).mean() < 3
    for data in (files.encode(picture, progressive=True), files.encode(picture, "PNG")):
        with pytest.raises(BadPictureError, match="too large: 800 x 600 pixels, the limit is 30000"):
            decode_picture(data, limit)
    with pytest.raises(BadPictureError, match="too large"):
        decode_picture(files.encode(picture), 800 * 600 // 100)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(640, 480), (70, 50)])
def test_region_equals_crop_then_resize(format_name: str, size: tuple[int, int]) -> None:
    data = files.encode(files.smooth(*size), format_name)
    region = Region(10, 5, size[0] - 9, size[1] - 2, mirrored=True)
    result = decode_region(data, lambda *_: region, (24, 32), Image.Resampling.BICUBIC, LIMIT)
    whole = Image.open(io.BytesIO(data))
    expected = whole.crop((10, 5, size[0] - 9, size[1] - 2)).resize((32, 24), Image.Resampling.BICUBIC)
    expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    difference = np.abs(np.asarray(result, dtype=float) - np.asarray(expected, dtype=float))
    assert result.size == (32, 24)
    assert difference.mean() < 1.5


def test_pillow_globals_are_left_alone() -> None:
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    for data, _ in files.bad_files().values():
        with pytest.raises(BadPictureError):
            VIEW(data, 0, 0)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_eval_view_is_the_inference_transform() -> None:
    data = files.jpeg(width=90, height=61)
    config = TransformConfig(32, resize_size=36)
    expected = ImageTransform(config)(Image.open(io.BytesIO(data)))
    assert torch.equal(EvalView(config)(data, 5, 7), expected)


# --- views ---


def test_view_seed_is_fixed_for_ever_and_spreads() -> None:
    assert view_seed(0, 0, 0) == 2558736989570252433
    seeds = {view_seed(s, i, v) for s in range(8) for i in range(16) for v in range(8)}
    assert len(seeds) == 8 * 16 * 8
    assert all(0 <= seed < 1 << 64 for seed in seeds)


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    low=st.floats(0.01, 1.0),
    seed=st.integers(0, (1 << 64) - 1),
)
def test_region_lies_in_the_picture(width: int, height: int, low: float, seed: int) -> None:
    region = random_region(width, height, (low, 1.0), (0.75, 4 / 3), True, seed)
    assert 0 <= region.left < region.right <= width
    assert 0 <= region.top < region.bottom <= height
    assert region == random_region(width, height, (low, 1.0), (0.75, 4 / 3), True, seed)


def test_regions_follow_their_distribution() -> None:
    regions = [
        random_region(400, 300, (0.2, 0.6), (0.8, 1.25), True, view_seed(1, index, 0))
        for index in range(2000)
    ]
    shares = np.array([(r.right - r.left) * (r.bottom - r.top) / 120_000 for r in regions])
    ratios = np.array([(r.right - r.left) / (r.bottom - r.top) for r in regions])
    assert shares.min() > 0.19
    assert shares.max() < 0.61
    assert abs(shares.mean() - 0.4) < 0.02
    assert ratios.min() > 0.78
    assert ratios.max() < 1.28
    assert abs(np.mean([r.mirrored for r in regions]) - 0.5) < 0.05
    assert abs(np.mean([r.left / (400 - (r.right - r.left)) for r in regions]) - 0.5) < 0.03
    assert not any(random_region(9, 9, (0.5, 1), (1, 1), False, seed).mirrored for seed in range(50))


def test_views_differ_by_index_view_and_seed_only() -> None:
    data = files.jpeg(width=64, height=64)
    base = VIEW(data, 1, 0)
    assert torch.equal(base, VIEW(data, 1, 0))
    assert not torch.equal(base, VIEW(data, 2, 0))
    assert not torch.equal(base, VIEW(data, 1, 1))
    assert not torch.equal(base, TrainView(TransformConfig(16), seed=1)(data, 1, 0))


def test_whole_picture_view_equals_squash_transform() -> None:
    config = TransformConfig((24, 32), resize="squash", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    view = TrainView(config, scale=(1.0, 1.0), ratio=(40 / 30, 40 / 30), flip=False)
    data = files.encode(files.smooth(40, 30), "PNG")
    assert torch.equal(view(data, 0, 0), ImageTransform(config)(Image.open(io.BytesIO(data))))


# --- tally ---


def test_tally_names_first_and_counts_all(caplog: pytest.LogCaptureFixture) -> None:
    tally = SkippedPictures("here", max_bad_share=0.5, names_kept=3)
    tally.add_seen(100)
    for number in range(10):
        tally.add(f"{number}.jpg", "truncated" if number % 2 else "broken", "detail")
    assert tally.total == 10
    assert tally.reasons == {"truncated": 5, "broken": 5}
    assert list(tally.names) == ["0.jpg", "1.jpg", "2.jpg"]
    assert "skipped 0.jpg: broken (detail)" in caplog.text
    assert "9.jpg" not in caplog.text
    assert tally.summary().startswith("here: 10 of 100 pictures skipped (5 ")
    again = SkippedPictures("here", max_bad_share=0.5, names_kept=3)
    again.load_state_dict(tally.state_dict())
    assert again.state_dict() == tally.state_dict()


def test_too_large_a_bad_share_stops() -> None:
    tally = SkippedPictures("here", max_bad_share=0.1)
    tally.add_seen(150)
    for number in range(30):
        tally.add(f"{number}.jpg", "broken")
    tally.check()  # too few seen to judge
    with pytest.raises(ValueError, match=r"30 of 150 pictures skipped .* more than data.max_bad_share = 0.1"):
        tally.check(whole_epoch=True)
    tally.add_seen(50)
    with pytest.raises(ValueError, match="30 of 200"):
        tally.check()
    tally.add_seen(100)
    tally.check()


def test_a_share_is_that_of_all_processes() -> None:
    tally = SkippedPictures("here", max_bad_share=0.1)
    tally.check_all([(100, 20), (99, 0)])  # too few seen to judge
    tally.check_all([(100, 15), (100, 5)])
    with pytest.raises(
        ValueError, match=r"here: 21 of 200 pictures skipped by 2 processes; that is more than"
    ):
        tally.check_all([(100, 20), (100, 1)])


def test_the_limit_of_pixels_is_the_settings_own() -> None:
    picture = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(picture, "PNG")  # more than Pillow opens of its own accord
    with pytest.raises(BadPictureError, match="too large: 14000 x 14000 pixels, the limit is 80000000"):
        decode_picture(picture.getvalue(), 80_000_000)
    region = Region(0, 0, 14_000, 14_000)
    small = decode_region(
        picture.getvalue(), lambda *size: region, (8, 8), Image.Resampling.BILINEAR, 400_000_000
    )
    assert small.size == (8, 8)
