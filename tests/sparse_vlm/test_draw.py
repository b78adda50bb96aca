"""RoI pictures, and the command that makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_vlm import SparseFormer
from sparse_vlm.draw import draw_rois, pick_colours
from sparse_vlm.look import look, main
from sparse_vlm.rois import build_initial_rois

GREY = Image.new("RGB", (60, 40), (128, 128, 128))


def _panel(
    rois: list[list[float]], points: list[list[list[float]]] | None = None, **more: object
) -> np.ndarray:
    """One panel without margins around the drawing, as an array (H, W, 3)."""
    page = draw_rois(
        GREY,
        [torch.tensor(rois)],
        None if points is None else [torch.tensor(points)],
        titles=[""],
        panel_width=120,
        show_picture=False,
        **more,  # type: ignore[arg-type]
    )
    array = np.asarray(page).astype(int)
    margin = (page.width - 120) // 2
    return array[-margin - 80 : -margin, margin : margin + 120]


def _colourful(array: np.ndarray) -> np.ndarray:
    return array.max(-1) - array.min(-1) > 40


def test_box_is_where_the_roi_is() -> None:
    painted = _colourful(_panel([[0.25, 0.25, 0.75, 0.75]]))
    rows, columns = np.nonzero(painted)
    assert rows.min() == pytest.approx(20, abs=2)
    assert rows.max() == pytest.approx(60, abs=2)
    assert columns.min() == pytest.approx(30, abs=2)
    assert columns.max() == pytest.approx(90, abs=2)
    assert not painted[30:50, 40:80].any()  # a box, not a surface


def test_points_are_where_they_are() -> None:
    bare = _panel([[0.1, 0.1, 0.9, 0.9]])
    dotted = _panel([[0.1, 0.1, 0.9, 0.9]], [[[0.5, 0.5], [0.25, 0.75]]])
    rows, columns = np.nonzero(np.abs(bare - dotted).sum(-1) > 60)
    assert {(round(y, -1), round(x, -1)) for y, x in zip(rows, columns, strict=True)} == {(40, 60), (60, 30)}


def test_rois_outside_upside_down_and_empty_do_not_hurt() -> None:
    odd = [[-3.0, -2.0, -1.0, -1.0], [0.9, 0.8, 0.1, 0.2], [0.5, 0.5, 0.5, 0.5], [-1e9, 0.2, 1e9, 0.4]]
    assert _colourful(_panel(odd)).any()


def test_whole_picture_rois_become_one_frame() -> None:
    painted = _colourful(_panel([[0.0, 0.0, 1.0, 1.0], [-0.2, -0.2, 1.2, 1.3]]))
    assert painted[0].mean() > 0.9
    assert not painted[10:-10, 10:-10].any()


def test_only_some_tokens() -> None:
    boxes = [[0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.9, 0.9]]
    painted = _colourful(_panel(boxes, only=[1]))
    assert not painted[:40].any()
    assert painted[48:].any()


def test_picture_is_subdued_under_the_tokens_but_not_in_its_own_panel() -> None:
    red = Image.new("RGB", (40, 40), (220, 30, 30))
    page = np.asarray(draw_rois(red, [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], panel_width=100)).astype(int)
    own, stage = page[-50, 50], page[-50, -50]
    assert tuple(own) == (220, 30, 30)
    assert stage.sum() < own.sum()
    assert stage.max() - stage.min() < own.max() - own.min()


@pytest.mark.parametrize(("theme", "page"), [("light", (255, 255, 255)), ("dark", (17, 18, 21))])
def test_layout(theme: str, page: tuple[int, int, int]) -> None:
    rois = [build_initial_rois(9, "half")] * 5
    wide, tall = (draw_rois(GREY, rois, theme=theme, columns=c, panel_width=64) for c in (6, 2))
    assert wide.width > 6 * 64
    assert wide.height < 2 * 64
    assert tall.width < 3 * 64
    assert wide.getpixel((0, 0)) == tall.getpixel((0, 0)) == page


@pytest.mark.parametrize("count", [1, 9, 49, 100])
def test_colours_are_distinct_and_bright(count: int) -> None:
    colours = pick_colours(build_initial_rois(count, "tiles").numpy())
    assert len(set(colours)) == count
    assert min(max(colour) for colour in colours) > 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rois": []}, "at least one step"),
        ({"rois": [torch.zeros(3, 5)]}, r"rois of a step must have the shape \(N, 4\), got \(3, 5\)"),
        ({"points": [torch.zeros(1, 2)]}, r"points of a step must have the shape \(N, P, 2\)"),
        ({"points": [torch.zeros(3, 2, 2)]}, "same steps and tokens"),
        ({"rois": [torch.full((1, 4), float("nan"))]}, "rois hold values that are not finite"),
        ({"titles": ["a", "b"]}, "a title for each of the 1 steps, got 2"),
        ({"theme": "blue"}, "theme must be 'light' or 'dark', got 'blue'"),
        ({"columns": 0}, "columns must be at least 1"),
        ({"panel_width": 20_000}, "panel_width 32 to 4096 pixels, got 3 and 20000"),
        ({"only": [1]}, r"only must name tokens from 0 to 0, got \[1\]"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_rois(**{"picture": GREY, "rois": [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], **arguments})


def test_look_draws_every_step(build_tiny: Callable[..., SparseFormer]) -> None:
    encoder = build_tiny()
    drawing = look(encoder, Image.new("L", (50, 90), 90), panel_width=40, columns=4)
    assert drawing.width > 4 * 40  # the picture, two steps and the hand-over in one row
    few = look(encoder, GREY, 5, panel_width=40, columns=4)
    assert few.size == drawing.size
    assert np.asarray(few).tolist() != np.asarray(drawing).tolist()


def test_command_end_to_end(
    build_tiny: Callable[..., SparseFormer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_tiny("latents").save(tmp_path / "encoder")
    Image.new("RGB", (70, 50), (40, 90, 160)).save(tmp_path / "photo.jpg")
    common = ["--encoder", str(tmp_path / "encoder"), "--image", str(tmp_path / "photo.jpg"), "--width", "48"]
    assert main([*common, "-o", str(tmp_path / "look.png")]) == 0
    more = ["--tokens", "9", "--only", "0,4", "--columns", "2", "--dark"]
    assert main([*common, "-o", str(tmp_path / "dark.png"), *more]) == 0
    assert "look.png" in capsys.readouterr().out
    with Image.open(tmp_path / "look.png") as light, Image.open(tmp_path / "dark.png") as dark:
        assert light.getpixel((0, 0)) == (255, 255, 255)
        assert dark.getpixel((0, 0)) == (17, 18, 21)
        assert dark.width < light.width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--image": "nowhere.jpg"}, "there is no picture file at"),
        ({"--image": "encoder/config.json"}, "cannot be read as a picture"),
        ({"--encoder": "nowhere"}, "there is no encoder directory at"),
        ({"-o": "out.doc"}, "must end in .png"),
        ({"--tokens": "1"}, "num_tokens must be at least 2"),
        ({"--only": "0,99"}, "only must name tokens from 0 to 47"),
        ({"--only": ""}, "--only must be numbers with commas between them"),
    ],
)
def test_command_explains_what_is_wrong(
    changes: dict[str, str],
    message: str,
    build_tiny: Callable[..., SparseFormer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny().save("encoder")
    GREY.save("photo.png")
    options = {"--encoder": "encoder", "--image": "photo.png", "-o": "out.png", "--width": "40", **changes}
    assert main([word for pair in options.items() for word in pair]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not Path("out.png").exists()
