"""Average pooling to N."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Seen
from .full import VitTower


def choose_grid(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns with rows * columns = N that fit the patch grid and are nearest to its shape."""
    height, width = grid
    fitting = [
        (rows, num_tokens // rows)
        for rows in range(1, height + 1)
        if num_tokens % rows == 0 and num_tokens // rows <= width
    ]
    if not fitting:
        return None
    return min(fitting, key=lambda shape: max(shape[0] * width, shape[1] * height) / min(
        shape[0] * width, shape[1] * height
    ))  # fmt: skip


class PoolingTower(VitTower):
    """Adaptive average pooling of the patch grid to rows x columns = N (see :func:`choose_grid`).

    Where the bins do not divide the grid they overlap by a patch, as torch's adaptive pooling has it. Where
    no such rows and columns exist (a prime N above the grid's side), patches in raster order are pooled to N.
    """

    name = "pool"

    def reduce(self, seen: Seen) -> Tensor:
        """See :class:`Tower`."""
        channels_first = seen.tokens.transpose(1, 2)  # (B, D, P)
        shape = choose_grid(self.num_tokens, self.vit.spec.grid)
        if shape is None:
            return F.adaptive_avg_pool1d(channels_first, self.num_tokens).transpose(1, 2)  # (B, N, D)
        field = channels_first.unflatten(2, self.vit.spec.grid)  # (B, D, h, w)
        return F.adaptive_avg_pool2d(field, shape).flatten(2).transpose(1, 2)  # (B, N, D)
