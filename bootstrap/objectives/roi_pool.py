"""What a teacher's patch tokens say about a region: their average over the area of an RoI."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_rois(patch_tokens: Tensor, rois_xyxy: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average patch tokens over RoIs, each patch weighted by the area it shares with the RoI.

    An RoI is first cut to the picture. One that covers almost nothing (or lies outside) reads the patch
    nearest to it. RoIs are detached: a target must not learn to be easy.

    Args:
        patch_tokens: (B, h * w, D), row by row.
        rois_xyxy: (B, N, 4), fractions of the picture.
        grid: (h, w).

    Returns:
        (B, N, D).
    """
    rows, columns = grid
    corners = rois_xyxy.detach().to(patch_tokens.dtype).clamp(0.0, 1.0)
    x1, y1, x2, y2 = corners.unbind(-1)
    across = _overlap(torch.minimum(x1, x2), torch.maximum(x1, x2), columns)  # (B, N, w)
    down = _overlap(torch.minimum(y1, y2), torch.maximum(y1, y2), rows)  # (B, N, h)
    weights = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)  # (B, N, h * w)
    return weights @ patch_tokens


def _overlap(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Share of each of ``cells`` equal cells of [0, 1] in [low, high]; shares sum to one."""
    # At least a thousandth of a cell wide, so that an empty interval still reads the cell it lies in.
    least = 1e-3 / cells
    low = low.clamp(max=1.0 - least)
    high = torch.maximum(high, low + least)
    edges = torch.arange(cells + 1, dtype=low.dtype, device=low.device) / cells
    shared = torch.minimum(high.unsqueeze(-1), edges[1:]) - torch.maximum(low.unsqueeze(-1), edges[:-1])
    shared = shared.clamp(min=0.0)
    return shared / shared.sum(dim=-1, keepdim=True)
