"""The words of the scene world: shapes, colours, textures, printed words, and the held-out pairs."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 135, 15),
    "yellow": (250, 225, 45),
    "green": (35, 160, 60),
    "cyan": (60, 215, 225),
    "blue": (35, 70, 215),
    "purple": (125, 35, 165),
    "pink": (255, 150, 195),
}

TEXTURES = ("solid", "striped", "dotted", "checked")

WORDS = (
    "cat", "dog", "sun", "tea", "bus", "map", "pen", "key", "box", "cup", "hat", "jam",
    "owl", "fox", "zip", "fig", "yes", "no", "go", "up", "run", "win", "max", "hi",
)  # fmt: skip

NUMBERS = tuple(str(number) for number in range(100))

SPLITS = ("train", "valid", "heldout")
"""`train` and `valid` use the seen pairs only; in `heldout` the main object's pair occurs in neither."""

HELDOUT_PAIRS = frozenset(
    (shape, tuple(COLORS)[(3 * index + 1) % len(COLORS)]) for index, shape in enumerate(SHAPES)
)
"""(shape, colour) pairs that training never shows: each shape once and each colour once."""

ALL_PAIRS = tuple((shape, color) for color in COLORS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELDOUT_PAIRS)
CLASS_NAMES = tuple(f"{color} {shape}" for shape, color in ALL_PAIRS)
"""The zero-shot classes, in the order of their label."""

COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def class_index(shape: str, color: str) -> int:
    """Zero-shot label of a (shape, colour) pair."""
    return ALL_PAIRS.index((shape, color))


def with_article(noun: str) -> str:
    """`a red circle`, `an orange ring`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")
