"""Draws a scene with Pillow."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bootstrap.scenes.scene import PrintedText, Scene, SceneObject, printed_half_size

_OVERSAMPLE = 2
Point = tuple[float, float]


def _turn(points: list[Point], thing: SceneObject, side: int) -> list[Point]:
    angle = math.radians(thing.angle)
    cos, sin = math.cos(angle), math.sin(angle)
    cx, cy, scale = thing.x * side, thing.y * side, thing.radius * side
    return [(cx + scale * (x * cos - y * sin), cy + scale * (x * sin + y * cos)) for x, y in points]


def _unit_outline(shape: str) -> list[Point]:
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.92, 0.7), (-0.92, 0.7)]
    if shape == "star":
        corners = []
        for corner in range(10):
            length, angle = (1.0, 0.42)[corner % 2], math.pi * (corner / 5 - 0.5)
            corners.append((length * math.cos(angle), length * math.sin(angle)))
        return corners
    if shape == "cross":
        arm = 0.3
        return [
            (-arm, -0.95), (arm, -0.95), (arm, -arm), (0.95, -arm), (0.95, arm), (arm, arm),
            (arm, 0.95), (-arm, 0.95), (-arm, arm), (-0.95, arm), (-0.95, -arm), (-arm, -arm),
        ]  # fmt: skip
    if shape == "heart":
        steps = [2 * math.pi * step / 28 for step in range(28)]
        return [
            (
                math.sin(t) ** 3 * 0.98,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5,
            )
            for t in steps
        ]
    if shape == "moon":
        # An outer arc and, back again, an inner arc of a circle moved to the right.
        outer = [math.radians(50 + 260 * step / 20) for step in range(21)]
        points = [(math.cos(t), math.sin(t)) for t in outer]
        inner = [math.radians(297 - 234 * step / 16) for step in range(17)]
        return points + [(0.36 + 0.78 * math.cos(t) * 0.88, 0.86 * math.sin(t)) for t in inner]
    raise ValueError(f"Shape {shape!r} has no outline; it is drawn as an ellipse.")


_OUTLINES = {
    shape: _unit_outline(shape) for shape in ("square", "triangle", "star", "cross", "heart", "moon")
}


def _fill(
    draw: ImageDraw.ImageDraw, thing: SceneObject, side: int, color: int | tuple[int, int, int]
) -> None:
    if thing.shape in _OUTLINES:
        draw.polygon(_turn(_OUTLINES[thing.shape], thing, side), fill=color)
        return
    radius = thing.radius * side * 0.95
    box = [thing.x * side - radius, thing.y * side - radius, thing.x * side + radius, thing.y * side + radius]
    if thing.shape == "ring":
        draw.ellipse(box, outline=color, width=max(2, round(radius * 0.42)))
    else:
        draw.ellipse(box, fill=color)


@lru_cache(maxsize=64)
def _pattern(texture: str, period: int, side: int) -> Image.Image:
    """Mask of the dark parts of a texture."""
    column, row = np.meshgrid(np.arange(side), np.arange(side))
    if texture == "striped":
        dark = (column + row) % period < 0.45 * period
    elif texture == "checked":
        dark = (column // (period // 2) + row // (period // 2)) % 2 == 0
    else:
        offset = (row // period) % 2 * (period // 2)
        x, y = (column + offset) % period - period / 2 + 0.5, row % period - period / 2 + 0.5
        dark = x * x + y * y < (0.3 * period) ** 2
    return Image.fromarray(dark.astype(np.uint8) * 255)


def _draw_object(picture: Image.Image, draw: ImageDraw.ImageDraw, thing: SceneObject, side: int) -> None:
    _fill(draw, thing, side, thing.rgb)
    if thing.texture == "solid":
        return
    dark = tuple(int(0.42 * channel) for channel in thing.rgb)
    reach = math.ceil(thing.radius * side) + 1
    left, top = int(thing.x * side) - reach, int(thing.y * side) - reach
    box = (left, top, left + 2 * reach, top + 2 * reach)
    mask = Image.new("L", (2 * reach, 2 * reach))
    moved = ImageDraw.Draw(mask)
    local = _Shifted(thing, left, top, side)
    _fill(moved, local.thing, 1, 255)
    period = max(8, round(thing.radius * side * (0.42 if thing.main else 0.62)) // 2 * 2)
    pattern = _pattern(thing.texture, period, max(64, side)).crop((0, 0, 2 * reach, 2 * reach))
    picture.paste(dark, box, Image.composite(pattern, Image.new("L", pattern.size), mask))


class _Shifted:
    """An object in the pixel frame of its own bounding box."""

    def __init__(self, thing: SceneObject, left: int, top: int, side: int) -> None:
        self.thing = SceneObject(
            thing.shape,
            thing.color,
            thing.texture,
            thing.x * side - left,
            thing.y * side - top,
            thing.radius * side,
            thing.angle,
            thing.rgb,
        )


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError as error:
        raise RuntimeError(
            "Scenes print words in Pillow's own font; that needs Pillow 10.1 or newer."
        ) from error


def _draw_printed(draw: ImageDraw.ImageDraw, printed: PrintedText, side: int) -> None:
    half_width, half_height = (half * side for half in printed_half_size(printed.text, printed.height))
    x, y = printed.x * side, printed.y * side
    plate, ink = ((25, 25, 30), (250, 250, 250)) if printed.dark_plate else ((250, 250, 250), (15, 15, 20))
    draw.rectangle([x - half_width, y - half_height, x + half_width, y + half_height], fill=plate)
    draw.text((x, y), printed.text, fill=ink, font=_font(round(printed.height * side)), anchor="mm")


def _muted(rng: random.Random) -> tuple[int, int, int]:
    # Near-grey, so that nothing in the background passes for an object's colour.
    grey = rng.randint(60, 200)
    red, green, blue = (max(0, min(255, grey + rng.randint(-16, 16))) for _ in range(3))
    return red, green, blue


def _draw_background(scene: Scene, side: int) -> Image.Image:
    rng = random.Random(scene.background_seed)
    first, second = np.array(_muted(rng), np.float32), np.array(_muted(rng), np.float32)
    small = side // 8
    # RandomState's streams are frozen by numpy's promise, which Generator's are not.
    noise = np.random.RandomState(scene.background_seed)
    pixels: np.ndarray
    if scene.background == "plain":
        pixels = np.broadcast_to(first, (small, small, 3))
    elif scene.background == "gradient":
        angle = rng.uniform(0.0, 2 * math.pi)
        axis = np.linspace(-0.7, 0.7, small, dtype=np.float32)
        share = np.clip(0.5 + axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle), 0, 1)
        pixels = first + share[..., None] * (second - first)
    elif scene.background == "noise":
        pixels = first + noise.uniform(-42, 42, (small, small, 1)) + noise.uniform(-8, 8, (small, small, 3))
    else:
        coarse = noise.uniform(0, 1, (4, 4, 1))
        pixels = np.repeat(np.repeat(first + coarse * (second - first), small // 4 + 1, 0), small // 4 + 1, 1)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(1, 6)):
        x0, y0, x1, y1 = (rng.uniform(0, side) for _ in range(4))
        if rng.random() < 0.6:
            draw.line([x0, y0, x1, y1], fill=_muted(rng), width=rng.randint(1, 3) * side // 96)
        else:
            wide, high = rng.uniform(0.02, 0.08) * side, rng.uniform(0.02, 0.08) * side
            draw.ellipse([x0 - wide, y0 - high, x0 + wide, y0 + high], fill=_muted(rng))
    return picture


def draw_scene(scene: Scene, size: int = 96) -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        size: Side of the picture in pixels, at least 32.

    Returns:
        An RGB picture of size x size pixels.

    Raises:
        ValueError: If `size` is below 32.
    """
    if size < 32:
        raise ValueError(f"A scene of {size} pixels cannot be recognised; size must be 32 or more.")
    side = size * _OVERSAMPLE
    picture = _draw_background(scene, side)
    draw = ImageDraw.Draw(picture)
    for thing in scene.objects:
        _draw_object(picture, draw, thing, side)
    if scene.printed is not None:
        _draw_printed(draw, scene.printed, side)
    return picture.reduce(_OVERSAMPLE)
