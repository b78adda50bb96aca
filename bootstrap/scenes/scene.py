"""What a scene is, and the pure function that invents one from (seed, split, index)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from bootstrap.scenes.vocabulary import (
    ALL_PAIRS,
    COLORS,
    HELDOUT_PAIRS,
    NUMBERS,
    SEEN_PAIRS,
    SHAPES,
    SPLITS,
    TEXTURES,
    WORDS,
    class_index,
)

# Radii are fractions of the picture's side. The three bands do not touch, so "small", "large" and the
# main object can be told apart by eye.
MAIN_RADIUS = (0.19, 0.25)
LARGE_RADIUS = (0.12, 0.145)
SMALL_RADIUS = (0.07, 0.09)
MAX_OBJECTS = 6
_TRIES = 40
# Centres closer than this share of the two radii would hide more than about a third of an object.
_MIN_DISTANCE = 0.8


@dataclass(frozen=True)
class SceneObject:
    """One object; `x`, `y` (centre) and `radius` are fractions of the side, `angle` is in degrees."""

    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]
    main: bool = False

    @property
    def name(self) -> str:
        """Colour and shape, such as `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class PrintedText:
    """A printed word or number: `kind` is `word` or `number`; centre and height are fractions of the side."""

    text: str
    kind: str
    x: float
    y: float
    height: float
    dark_plate: bool


@dataclass(frozen=True)
class Scene:
    """Ground truth of one picture. `objects` run from back to front; exactly one is the main object."""

    seed: int
    split: str
    index: int
    objects: tuple[SceneObject, ...]
    printed: PrintedText | None
    background: str
    background_seed: int

    @property
    def main(self) -> SceneObject:
        """The largest object, which gives the picture its class."""
        return next(thing for thing in self.objects if thing.main)

    @property
    def label(self) -> int:
        """Zero-shot label of the main object."""
        return class_index(self.main.shape, self.main.color)

    @property
    def image_id(self) -> int:
        """An integer unique over the splits of one seed."""
        return SPLITS.index(self.split) * 10_000_000 + self.index


BACKGROUNDS = ("plain", "gradient", "noise", "patches")


def printed_half_size(text: str, height: float) -> tuple[float, float]:
    """Half width and half height of the plate that carries `text`, as fractions of the side."""
    return (0.31 * len(text) + 0.2) * height, 0.62 * height


def _jitter(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, channel + rng.randint(-14, 14))) for channel in rgb)
    return red, green, blue


def _is_free(x: float, y: float, radius: float, placed: list[SceneObject], box: PrintedText | None) -> bool:
    touching = 0
    for other in placed:
        distance = math.hypot(x - other.x, y - other.y)
        if distance < _MIN_DISTANCE * (radius + other.radius):
            return False
        touching += distance < radius + other.radius
    if touching > 1:  # of those that are there; later ones may touch the same object
        return False
    if box is None:
        return True
    half_width, half_height = printed_half_size(box.text, box.height)
    gap_x = max(abs(x - box.x) - half_width, 0.0)
    gap_y = max(abs(y - box.y) - half_height, 0.0)
    return math.hypot(gap_x, gap_y) > 0.9 * radius


def _build_printed(rng: random.Random, main: SceneObject) -> PrintedText | None:
    if rng.random() > 0.75:
        return None
    kind = "word" if rng.random() < 0.6 else "number"
    text = rng.choice(WORDS if kind == "word" else NUMBERS)
    height = rng.uniform(0.15, 0.18)
    half_width, half_height = printed_half_size(text, height)
    dark_plate = rng.random() < 0.5
    for _ in range(_TRIES):
        x = rng.uniform(half_width + 0.01, 0.99 - half_width)
        y = rng.uniform(half_height + 0.01, 0.99 - half_height)
        box = PrintedText(text, kind, x, y, height, dark_plate)
        if _is_free(main.x, main.y, main.radius, [], box):
            return box
    return None


def _pick_pair(
    rng: random.Random, placed: list[SceneObject], pairs: tuple[tuple[str, str], ...]
) -> tuple[str, str]:
    # Shapes and colours repeat on purpose, so that counts above one and hard negatives occur.
    shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    draw = rng.random()
    if draw < 0.35:
        shape = rng.choice(placed).shape
    elif draw < 0.7:
        color = rng.choice(placed).color
    return (shape, color) if (shape, color) in pairs else rng.choice(pairs)


def build_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Invents a scene. The same arguments give the same scene on every platform.

    Args:
        seed: Seed of the world.
        index: Number of the scene in its split.
        split: `train`, `valid` (new scenes of the seen pairs) or `heldout` (main object of an unseen pair).

    Raises:
        ValueError: If `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r} of the scenes; known are {', '.join(SPLITS)}.")
    rng = random.Random(f"scenes/{seed}/{split}/{index}")
    heldout = split == "heldout"
    pairs = ALL_PAIRS if heldout else SEEN_PAIRS
    shape, color = rng.choice(sorted(HELDOUT_PAIRS) if heldout else SEEN_PAIRS)

    def build_object(x: float, y: float, radius: float, main: bool) -> SceneObject:
        return SceneObject(
            shape,
            color,
            rng.choice(TEXTURES),
            x,
            y,
            radius,
            rng.uniform(-18.0, 18.0),
            _jitter(rng, COLORS[color]),
            main,
        )

    radius = rng.uniform(*MAIN_RADIUS)
    x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
    main = build_object(x, y, radius, True)
    printed = _build_printed(rng, main)
    placed = [main]
    for _ in range(rng.randint(1, MAX_OBJECTS - 1)):
        shape, color = _pick_pair(rng, placed, pairs)
        radius = rng.uniform(*(LARGE_RADIUS if rng.random() < 0.4 else SMALL_RADIUS))
        for _ in range(_TRIES):
            x, y = (rng.uniform(radius + 0.01, 0.99 - radius) for _ in range(2))
            if _is_free(x, y, radius, placed, printed):
                placed.append(build_object(x, y, radius, False))
                break
    # The main object stands at the front or behind one neighbour.
    others = placed[1:]
    spot = len(others) - (rng.random() < 0.3)
    objects = (*others[:spot], main, *others[spot:])
    return Scene(seed, split, index, objects, printed, rng.choice(BACKGROUNDS), rng.randrange(2**31))
