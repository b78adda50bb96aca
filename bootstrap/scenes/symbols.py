"""Scenes as a grid of symbols: what a perfect eye would tell a language model, one token a cell.

A small language model that learns to read these also learns how an answer is looked up among visual tokens.
Behind a real vision tower only the tower's dialect is new to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bootstrap.scenes.scene import Scene, printed_half_size
from bootstrap.scenes.vocabulary import COLORS, NUMBERS, SHAPES, TEXTURES, WORDS

_COLORS = tuple(COLORS)
_TEXTS = (*WORDS, *NUMBERS)
_KINDS = (len(_COLORS), len(SHAPES), len(TEXTURES), len(_TEXTS))
_NUMBERS = 5  # x and y of the cell; x, y and radius of what is in it


def describe_cells(scene: Scene, side: int) -> tuple[Tensor, Tensor]:
    """What each cell of a grid shows.

    Args:
        scene: The scene.
        side: Cells a side.

    Returns:
        (side * side, 4) indices of colour, shape, texture and printed text, 0 for none; and (side * side, 5)
        the cell's centre, and centre and radius of the object in it (0 where there is none), in fractions of
        the picture.
    """
    kinds = torch.zeros(side, side, len(_KINDS), dtype=torch.long)
    numbers = torch.zeros(side, side, _NUMBERS)
    centres = (torch.arange(side) + 0.5) / side
    numbers[..., 0], numbers[..., 1] = centres[None, :], centres[:, None]
    x, y = numbers[..., 0], numbers[..., 1]
    for thing in scene.objects:  # from back to front
        # A cell that an object touches with its edge only still sees it.
        reach = thing.radius + 0.25 / side
        inside = (x - thing.x).square() + (y - thing.y).square() <= reach**2
        kinds[inside] = torch.tensor(
            [
                1 + _COLORS.index(thing.color),
                1 + SHAPES.index(thing.shape),
                1 + TEXTURES.index(thing.texture),
                0,
            ]
        )
        numbers[inside, 2:] = torch.tensor([thing.x, thing.y, thing.radius])
    printed = scene.printed
    if printed is not None:
        width, height = printed_half_size(printed.text, printed.height)
        inside = ((x - printed.x).abs() <= width + 0.5 / side) & (
            (y - printed.y).abs() <= height + 0.5 / side
        )
        kinds[..., 3][inside] = 1 + _TEXTS.index(printed.text)
    return kinds.flatten(0, 1), numbers.flatten(0, 1)


class SymbolicEye(nn.Module):
    """Cells to tokens: one learned vector a colour, shape, texture and text, and a map of the numbers.

    Args:
        width: Of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count + 1, width) for count in _KINDS)
        self.numbers = nn.Sequential(nn.Linear(_NUMBERS, width), nn.GELU(), nn.Linear(width, width))
        for table in self.tables.parameters():
            nn.init.normal_(table, std=0.02)

    def forward(self, kinds: Tensor, numbers: Tensor) -> Tensor:
        """Tokens (B, cells, D) of cells: kinds (B, cells, 4), numbers (B, cells, 5)."""
        tokens: Tensor = self.numbers(numbers)
        for place, table in enumerate(self.tables):
            tokens = tokens + table(kinds[..., place])
        return tokens
