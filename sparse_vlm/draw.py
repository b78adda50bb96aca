"""Pictures of where the tokens of a SparseFormer look: RoIs and sampling points over the photograph."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from torch import Tensor

from .transform import to_rgb

# Overlays are drawn this much larger and reduced with a Lanczos filter: Pillow's own lines have hard edges.
_SUPERSAMPLING = 3
# A RoI that covers this share of the picture in both directions is drawn with the frame, not as a box.
_WHOLE = 0.97

_THEMES = {
    "light": {"page": (255, 255, 255), "title": (28, 28, 30), "note": (118, 118, 124)},
    "dark": {"page": (17, 18, 21), "title": (240, 240, 242), "note": (150, 150, 158)},
}
# Wider panels take gigabytes, and show no more.
_NARROWEST, _WIDEST = 32, 4096


def draw_rois(
    picture: Image.Image,
    rois: Sequence[Tensor],
    points: Sequence[Tensor] | None = None,
    *,
    titles: Sequence[str] | None = None,
    columns: int = 3,
    panel_width: int = 480,
    theme: str = "light",
    only: Collection[int] | None = None,
    show_picture: bool = True,
) -> Image.Image:
    """Draw one panel per focusing step: every token's RoI and sampling points over the picture.

    A token keeps its colour through all panels. Colours are even in hue to the eye and ordered by the angle
    at which tokens start around the picture's centre, so neighbours have similar ones. RoIs that span the
    whole picture are counted in the panel's note and drawn once, as its frame.

    Args:
        picture: what the encoder saw, in any resolution (`encoder.transform.crop` for its own).
        rois: one (N, 4) tensor per step, xyxy fractions of the picture.
        points: one (N, P, 2) tensor per step, xy fractions; None draws boxes only.
        titles: one per step; by default "step 1", "step 2", ..., "hand-over".
        columns: panels in a row.
        panel_width: width of a panel in pixels.
        theme: ``"light"`` (for paper) or ``"dark"``.
        only: indices of the tokens to draw; all by default.
        show_picture: begin with a panel of the untouched picture.

    Returns:
        An RGB picture.

    Raises:
        ValueError: for tensors of other shapes, an unknown theme, or tokens that do not exist.
    """
    boxes = [_to_array(value, 2, 4, "rois") for value in rois]
    if not boxes:
        raise ValueError("rois must hold at least one step")
    if any(len(box) != len(boxes[0]) for box in boxes):
        raise ValueError(f"every step must have the same tokens, got {[len(box) for box in boxes]}")
    dots: list[np.ndarray | None] = [None] * len(boxes)
    if points is not None:
        dots = [_to_array(value, 3, 2, "points") for value in points]
    if len(dots) != len(boxes) or any(d is not None and len(d) != len(boxes[0]) for d in dots):
        raise ValueError("rois and points must have the same steps and tokens")
    titles = titles or [*(f"step {index}" for index in range(1, len(boxes))), "hand-over"]
    if len(titles) != len(boxes):
        raise ValueError(f"there must be a title for each of the {len(boxes)} steps, got {len(titles)}")
    if theme not in _THEMES:
        raise ValueError(f"theme must be 'light' or 'dark', got {theme!r}")
    if columns < 1 or not _NARROWEST <= panel_width <= _WIDEST:
        raise ValueError(
            f"columns must be at least 1 and panel_width {_NARROWEST} to {_WIDEST} pixels, got {columns} and "
            f"{panel_width}"
        )
    tokens = sorted(set(only)) if only is not None else list(range(len(boxes[0])))
    if any(not 0 <= token < len(boxes[0]) for token in tokens):
        raise ValueError(f"only must name tokens from 0 to {len(boxes[0]) - 1}, got {tokens}")

    height = max(1, round(panel_width * picture.height / picture.width))
    photograph = to_rgb(picture).resize((panel_width, height), Image.Resampling.LANCZOS)
    colours = pick_colours(boxes[0])
    stage = _subdue(photograph)
    panels: list[tuple[str, str, Image.Image]] = [("picture", "", photograph)] if show_picture else []
    for title, box, dot in zip(titles, boxes, dots, strict=True):
        panel, whole = _draw_step(stage, box, dot, colours, tokens)
        panels.append((title, f"{whole} see the whole picture" if whole else "", panel))
    return _lay_out(panels, columns, theme)


def pick_colours(rois: np.ndarray) -> list[tuple[int, int, int]]:
    """One colour per token: hues at even distances on the OKLCH circle, in the order of the tokens' places.

    Args:
        rois: (N, 4), where the tokens start.

    Returns:
        N sRGB triples.
    """
    centre = (rois[:, :2] + rois[:, 2:]) / 2 - 0.5
    angle, radius = np.arctan2(centre[:, 1], centre[:, 0]), np.hypot(centre[:, 0], centre[:, 1])
    # Tokens at the very centre have no angle of their own: they get paler colours from the whole circle.
    central = radius < 1e-3
    colours = [(0, 0, 0)] * len(rois)
    for group, pale in ((np.flatnonzero(~central), 0.0), (np.flatnonzero(central), 0.08)):
        order = group[np.argsort(angle[group], kind="stable")]
        for rank, token in enumerate(order):
            # Two tones in turn keep neighbours apart where the hues of many tokens come close.
            tone = (0.82 if rank % 2 else 0.73) + pale
            colours[token] = _oklch_to_srgb(tone, 0.17, 2 * math.pi * rank / len(order) + 0.4)
    return colours


def _draw_step(
    stage: Image.Image,
    boxes: np.ndarray,
    dots: np.ndarray | None,
    colours: Sequence[tuple[int, int, int]],
    tokens: Sequence[int],
) -> tuple[Image.Image, int]:
    """A panel, and how many of its tokens see the whole picture."""
    width, height = stage.width * _SUPERSAMPLING, stage.height * _SUPERSAMPLING
    scale = min(width, height) / 480
    overlay = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(overlay)
    line, halo = max(2, round(1.5 * scale)), max(1, round(0.7 * scale))
    # Few tokens can be drawn stronger than many.
    if len(tokens) <= 16:
        line = round(line * 1.5)
    spans = np.minimum(boxes[:, 2:], 1) - np.maximum(boxes[:, :2], 0)
    whole = [token for token in tokens if (spans[token] >= _WHOLE).all()]
    size = np.array([width, height, width, height])
    for token in sorted(tokens, key=lambda t: -float(spans[t].clip(0).prod())):
        if token in whole:
            continue
        corners = _inside(boxes[token] * size, width, height, line + halo)
        radius = 2.5 * scale
        draw.rounded_rectangle(
            (*(corners[:2] - halo), *(corners[2:] + halo)), radius, None, (0, 0, 0, 105), line + 2 * halo
        )
        draw.rounded_rectangle(tuple(corners), radius, None, (*colours[token], 255), line)
    if dots is not None:
        radius = max((2.3 if len(tokens) <= 16 else 1.9) * scale, 1.2 * _SUPERSAMPLING)
        for token in tokens:
            for x, y in dots[token] * size[:2]:
                for extra, paint in ((halo, (0, 0, 0, 140)), (0.0, (*colours[token], 255))):
                    reach = radius + extra
                    draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=paint)
    if whole:
        _draw_frame(draw, width, height, [colours[token] for token in whole], line + halo)
    # Averaging straight colours would let the black of transparent pixels darken the edges.
    reduced = overlay.convert("RGBa").resize(stage.size, Image.Resampling.LANCZOS).convert("RGBA")
    return Image.alpha_composite(stage.convert("RGBA"), reduced).convert("RGB"), len(whole)


def _draw_frame(
    draw: ImageDraw.ImageDraw, width: int, height: int, colours: Sequence[tuple[int, int, int]], line: int
) -> None:
    """A frame whose pieces take the colours of the tokens that see the whole picture, in turn."""
    inset = line / 2
    corners = [
        (inset, inset),
        (width - inset, inset),
        (width - inset, height - inset),
        (inset, height - inset),
    ]
    perimeter = 2 * (width + height)
    pieces = max(len(colours) * math.ceil(24 / len(colours)), 24)
    done = 0.0
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = math.hypot(x2 - x1, y2 - y1)
        count = max(1, round(pieces * length / perimeter))
        for index in range(count):
            a, b = index / count, (index + 1) / count
            colour = colours[int(done + index) % len(colours)]
            ends = (x1 + a * (x2 - x1), y1 + a * (y2 - y1), x1 + b * (x2 - x1), y1 + b * (y2 - y1))
            draw.line(ends, fill=(*colour, 255), width=line)
        done += count


def _inside(corners: np.ndarray, width: int, height: int, line: int) -> np.ndarray:
    """Ordered corners; edges that lie on the picture's border move in so that the line is whole."""
    ordered = np.concatenate((np.minimum(corners[:2], corners[2:]), np.maximum(corners[:2], corners[2:])))
    limits = np.array([width, height])
    for axis in (0, 1):
        near, far = ordered[axis], ordered[axis + 2]
        if abs(near) < line:
            ordered[axis] = line / 2
        if abs(far - limits[axis]) < line:
            ordered[axis + 2] = limits[axis] - line / 2
    # Far-away corners only cost time; the minimum size keeps a collapsed RoI visible.
    reach = 4.0 * max(width, height)
    ordered = ordered.clip(-reach, reach)
    ordered[2:] = np.maximum(ordered[2:], ordered[:2] + line)
    return ordered


def _subdue(photograph: Image.Image) -> Image.Image:
    """Less colour and light, so that the tokens carry the colour."""
    return ImageEnhance.Brightness(ImageEnhance.Color(photograph).enhance(0.45)).enhance(0.7)


def _lay_out(panels: Sequence[tuple[str, str, Image.Image]], columns: int, theme: str) -> Image.Image:
    colours = _THEMES[theme]
    width, height = panels[0][2].size
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    letter = max(9, round(width * 0.062))
    gap, header, margin = round(width * 0.045), round(letter * 1.5), round(width * 0.04)
    page = Image.new(
        "RGB",
        (
            2 * margin + columns * width + (columns - 1) * gap,
            2 * margin + rows * (header + height) + (rows - 1) * gap,
        ),
        colours["page"],
    )
    draw = ImageDraw.Draw(page)
    large, small = _font(letter), _font(round(letter * 0.72))
    for index, (title, note, panel) in enumerate(panels):
        left = margin + (index % columns) * (width + gap)
        top = margin + (index // columns) * (header + height + gap)
        baseline = top + letter
        draw.text((left, baseline), title, fill=colours["title"], font=large, anchor=_anchor(large, "ls"))
        draw.text(
            (left + width, baseline), note, fill=colours["note"], font=small, anchor=_anchor(small, "rs")
        )
        page.paste(panel, (left, top + header))
    return page


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one small bitmap font only
        return ImageFont.load_default()


def _anchor(font: Any, anchor: str) -> str | None:
    return anchor if isinstance(font, ImageFont.FreeTypeFont) else None


def _to_array(value: Tensor, dimensions: int, last: int, name: str) -> np.ndarray:
    if value.ndim != dimensions or value.shape[-1] != last:
        shape = "(N, 4)" if name == "rois" else "(N, P, 2)"
        raise ValueError(f"{name} of a step must have the shape {shape}, got {tuple(value.shape)}")
    array: np.ndarray = value.detach().float().cpu().numpy().astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold values that are not finite")
    return array


def _oklch_to_srgb(lightness: float, chroma: float, hue: float) -> tuple[int, int, int]:
    """OKLCH (Björn Ottosson, 2020) to sRGB; chroma is reduced until the colour can be shown."""
    while True:
        a, b = chroma * math.cos(hue), chroma * math.sin(hue)
        long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        )
        if chroma <= 0 or all(-1e-4 <= value <= 1 + 1e-4 for value in linear):
            break
        chroma -= 0.005
    encoded = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in np.clip(linear, 0, 1)]
    red, green, blue = (round(255 * value) for value in encoded)
    return red, green, blue
