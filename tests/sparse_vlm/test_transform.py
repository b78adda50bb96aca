"""The image transform against open_clip, timm and transformers: equal bits, every picture mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_vlm.preprocessor import from_preprocessor_dict, is_exact, to_preprocessor_dict
from sparse_vlm.transform import ImageTransform, TransformConfig, to_rgb

# (width, height): square, both orientations, odd, exact, tiny, one pixel, thin.
SIZES = [(64, 64), (90, 61), (61, 90), (32, 32), (33, 47), (5, 3), (1, 1), (200, 7), (31, 257)]
MODES = ["RGB", "L", "P", "LA", "RGBA", "CMYK", "1", "YCbCr", "HSV"]


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "RGBA":
        picture.putalpha(picture.convert("L"))
        return picture
    if mode == "LA":
        grey = picture.convert("L")
        return Image.merge("LA", (grey, grey))
    return picture.convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [32, (32, 32), (24, 40), (40, 24)])
def test_equals_open_clip(
    size: tuple[int, int], mode: str, resize: str, interpolation: str, image_size: Any
) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.transform.image_transform(
        image_size, is_train=False, resize_mode=resize, interpolation=interpolation
    )
    config = TransformConfig.from_open_clip(
        {"size": image_size, "resize_mode": resize, "interpolation": interpolation}
    )
    picture = noise(*size, mode)
    result = ImageTransform(config)(picture)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert torch.equal(result, theirs(picture))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_open_clip_after_conversion_to_rgb(mode: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.transform.image_transform(32, is_train=False)
    picture = noise(50, 41, mode)
    assert torch.equal(ImageTransform(TransformConfig(32))(picture), theirs(picture.convert("RGB")))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 24, 40)])
@pytest.mark.parametrize(
    ("crop_mode", "interpolation"), [("center", "bicubic"), ("center", "bilinear"), ("squash", "bicubic")]
)
def test_equals_timm(
    size: tuple[int, int], crop_pct: float, input_size: tuple[int, ...], crop_mode: str, interpolation: str
) -> None:
    timm_data = pytest.importorskip("timm.data")
    data_config = {
        "input_size": input_size,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.5, 0.3),
    }
    theirs = timm_data.create_transform(is_training=False, **data_config)
    picture = noise(*size)
    assert torch.equal(ImageTransform(TransformConfig.from_timm(data_config))(picture), theirs(picture))


def test_augreg_resizes_to_248_before_the_crop_of_224() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False)
    data_config = timm.data.resolve_data_config({}, model=model)
    config = TransformConfig.from_timm(data_config)
    assert config.image_size == 224
    assert config.resize_size == 248
    assert config.mean == config.std == (0.5, 0.5, 0.5)
    theirs = timm.data.create_transform(is_training=False, **data_config)
    picture = noise(301, 275)
    assert torch.equal(ImageTransform(config)(picture), theirs(picture))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    image_size=st.integers(1, 40),
    border=st.integers(0, 9),
)
def test_equals_torchvision_at_any_size(width: int, height: int, image_size: int, border: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    config = TransformConfig(image_size, resize_size=image_size + border, mean=(0.1,) * 3, std=(0.3,) * 3)
    theirs = transforms.Compose(
        [
            transforms.Resize(image_size + border, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )
    picture = noise(width, height, seed=width)
    assert torch.equal(ImageTransform(config)(picture), theirs(picture))


@pytest.mark.parametrize("size", [(3, 60_000), (60_000, 3)])
def test_extreme_strip_is_cropped_before_it_is_enlarged(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_vlm.transform as module

    config = TransformConfig(32)
    picture = noise(*size)
    whole = ImageTransform(config)(picture)
    monkeypatch.setattr(module, "_LARGEST_RESIZED_PIXELS", 1000)
    cropped_first = ImageTransform(config)(picture)
    # Pillow may take the two passes in the other order: single pixels differ, the picture does not.
    assert (whole - cropped_first).abs().mean() < 0.02
    assert (whole - cropped_first).abs().max() < 0.5


@pytest.mark.parametrize("mode", [*MODES, "I", "I;16", "I;16B", "F", "PA", "La", "RGBa", "LAB", "RGBX"])
def test_to_rgb_takes_every_mode(mode: str) -> None:
    if mode in ("I", "F", "I;16", "I;16B"):
        picture = Image.new(mode, (6, 5), 40)
    else:
        picture = Image.new(mode, (6, 5))
    result = to_rgb(picture)
    assert result.mode == "RGB"
    assert result.size == (6, 5)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_deep_grey_is_scaled_not_clipped(mode: str) -> None:
    ramp = (np.arange(256, dtype=np.uint32) * 257).reshape(16, 16)
    if mode == "I":
        picture = Image.fromarray(ramp.astype(np.int32))
    else:
        dtype = ">u2" if mode == "I;16B" else "<u2"
        picture = Image.frombytes(mode, (16, 16), ramp.astype(dtype).tobytes())
    assert picture.mode == mode
    grey = np.asarray(to_rgb(picture))[..., 0]
    assert np.array_equal(grey, np.arange(256).reshape(16, 16))


def test_float_pictures_are_scaled_by_their_range() -> None:
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    expected = np.rint(ramp.astype(np.float64) * 255)
    for factor in (1, 255, 65535):
        values = ramp * np.float32(factor)
        grey = np.asarray(to_rgb(Image.fromarray(values)))[..., 1]
        assert np.abs(grey - expected).max() <= 1
    broken = np.array([[np.nan, np.inf], [-1.0, 0.5]], dtype=np.float32)
    assert np.asarray(to_rgb(Image.fromarray(broken)))[..., 0].tolist() == [[0, 0], [0, 128]]


def test_palette_with_transparent_entries_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    picture = noise(9, 9).quantize(8)
    picture.info["transparency"] = bytes([0, 128, 255])
    assert to_rgb(picture).tobytes() == noise(9, 9).quantize(8).convert("RGB").tobytes()
    assert not recwarn.list


@pytest.mark.parametrize("thing", ["a.jpg", Path("a.jpg"), np.zeros((4, 4, 3)), torch.zeros(3, 4, 4)])
def test_what_is_no_picture_is_refused(thing: Any) -> None:
    transform = ImageTransform(TransformConfig(4))
    with pytest.raises(TypeError, match=f"expected a Pillow picture .*, got {type(thing).__name__}"):
        transform(thing)


def test_empty_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="empty picture of 0 x 4 pixels"):
        ImageTransform(TransformConfig(8))(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize(
    "config",
    [
        TransformConfig(),
        TransformConfig(224, resize_size=256, mean=(0.5,) * 3, std=(0.5,) * 3),
        TransformConfig((24, 40), resize="squash", interpolation="bilinear"),
        TransformConfig((24, 40), resize_size=(30, 44)),
        TransformConfig((24, 40), resize_size=48),
        TransformConfig(24, resize="squash", resize_size=(30, 28)),
    ],
)
def test_dictionaries_round_trip_through_json(config: TransformConfig) -> None:
    assert TransformConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    fields = json.loads(json.dumps(to_preprocessor_dict(config)))
    again = from_preprocessor_dict(fields)
    picture = noise(70, 45)
    assert torch.equal(ImageTransform(again)(picture), ImageTransform(config)(picture))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive integer or a pair"),
        ({"image_size": True}, "image_size must be"),
        ({"image_size": (8, 8, 8)}, "image_size must be"),
        ({"resize": "longest"}, "'longest' pads with borders"),
        ({"resize": "crop"}, "resize must be 'shortest' or 'squash', got 'crop'"),
        ({"interpolation": "lanczos"}, "interpolation must be 'bicubic' or 'bilinear'"),
        ({"resize_size": 200}, "resize_size 200 is smaller than image_size 224"),
        ({"image_size": (24, 40), "resize_size": 32}, "smaller than image_size"),
        ({"mean": (0.5, 0.5)}, "mean must be three finite numbers"),
        ({"std": (0.5, 0.5, 0.0)}, "std must be positive"),
        ({"std": (0.5, 0.5, float("nan"))}, "std must be three finite numbers"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformConfig(**changes)
    with pytest.raises(ValueError, match=f"here.json: .*{message}"):
        TransformConfig.from_dict({**TransformConfig().to_dict(), **changes}, source="here.json")


def test_the_same_pixels_may_be_written_in_several_ways() -> None:
    plain = TransformConfig(image_size=224)
    assert plain.prepares_like(TransformConfig(image_size=(224, 224), resize_size=224))
    for other in ({"resize_size": 256}, {"interpolation": "bilinear"}, {"std": (0.5, 0.5, 0.5)}):
        assert not plain.prepares_like(TransformConfig(image_size=224, **other))  # type: ignore[arg-type]


def test_from_dict_is_strict() -> None:
    values = TransformConfig().to_dict()
    with pytest.raises(ValueError, match=r"x.json: unknown key 'resize_sise'; did you mean 'resize_size'"):
        TransformConfig.from_dict({**values, "resize_sise": 3}, source="x.json")
    del values["mean"]
    with pytest.raises(ValueError, match="missing key mean"):
        TransformConfig.from_dict(values)


def cut(config: TransformConfig, width: int, height: int) -> tuple[int, int]:
    """Pixels cut away by the crop, in height and width."""
    resized = config.resized_size(height, width)
    return resized[0] - config.height, resized[1] - config.width


@pytest.mark.parametrize(
    "config",
    [
        TransformConfig(32),
        TransformConfig(32, resize_size=36, mean=(0.5,) * 3, std=(0.5,) * 3),
        TransformConfig(32, resize_size=36, interpolation="bilinear"),
        TransformConfig((24, 40), resize="squash"),
        TransformConfig((24, 40), resize_size=44),
    ],
)
def test_transformers_reads_the_same_pixels_from_our_file(config: TransformConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    assert is_exact(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(to_preprocessor_dict(config)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    compared = 0
    for width, height in SIZES:
        # Their crop starts one pixel earlier where half the cut is rounded up to even.
        if any(edge % 4 == 3 for edge in cut(config, width, height)):
            continue
        for mode in ("RGB", "L", "P", "CMYK"):
            picture = noise(width, height, mode)
            theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(theirs, ImageTransform(config)(picture))
            compared += 1
    assert compared > 10


@pytest.mark.parametrize(
    "name",
    [
        "CLIPImageProcessor",
        "SiglipImageProcessor",
        "ViTImageProcessor",
        "BitImageProcessor",
    ],
)
def test_default_processors_of_transformers_are_read(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, name)()
    fields = json.loads(processor.to_json_string())
    config = from_preprocessor_dict(fields)
    assert config.image_size == 224
    assert config.resize == ("shortest" if processor.do_center_crop else "squash")
    assert config.mean == pytest.approx(processor.image_mean)
    assert config.interpolation == {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
    # The same from a file that relies on the class's own defaults.
    assert from_preprocessor_dict({"image_processor_type": name, "size": fields["size"]}) == config
    assert from_preprocessor_dict({"image_processor": fields}) == config


def test_old_clip_file_is_read() -> None:
    fields = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 256, "crop_size": 224, "resample": 3}
    assert from_preprocessor_dict(fields) == TransformConfig(224, resize_size=256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "'ConvNextImageProcessor' is not one of"),
        ({"do_resize": False}, "do_resize must be true"),
        ({"do_rescale": False}, "do_rescale must be true"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor must be 1/255"),
        ({"resample": 1}, "resample must be 2"),
        ({"size": {"longest_edge": 224}}, "size must be"),
        ({"do_pad": True}, "do_pad"),
        ({"do_center_crop": False}, "without do_center_crop"),
        ({"image_std": [0, 0, 0]}, "f.json: transform: std must be positive"),
    ],
)
def test_foreign_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {**to_preprocessor_dict(TransformConfig()), **changes}
    with pytest.raises(ValueError, match=message):
        from_preprocessor_dict(fields, source="f.json")
