"""The bilinear read-out and its gradients in plain PyTorch: what the kernels are held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rois import at_least_fp32


def sample_plain(feature_map: Tensor, points_xy: Tensor, padding: str = "border") -> Tensor:
    """:func:`sparse_vlm.sampling.sample_features` in PyTorch's own words."""
    values = at_least_fp32(feature_map)
    sampled = F.grid_sample(
        values,
        _place(points_xy, values.dtype),
        mode="bilinear",
        padding_mode=padding,
        align_corners=False,
    )  # (B, C, N, P)
    return sampled.permute(0, 2, 3, 1).to(feature_map.dtype)  # (B, N, P, C)


def _place(points_xy: Tensor, dtype: torch.dtype) -> Tensor:
    """The points as grid_sample counts, from -1 to 1."""
    # A diverged model's coordinates are not numbers, and grid_sample's gradient on the CPU then writes
    # outside its memory. Read the middle instead: the tokens carry their NaN on, so the loss still shows it.
    return torch.nan_to_num(points_xy.to(dtype) * 2.0 - 1.0, nan=0.0, posinf=1e4, neginf=-1e4)


def sample_gradients_plain(
    gradient: Tensor, feature_map: Tensor, points_xy: Tensor, padding: str
) -> tuple[Tensor, Tensor]:
    """What autograd makes of :func:`sample_plain`, by hand: within an operator PyTorch takes no gradients.

    Args:
        gradient: of the samples, (B, N, P, C).
        feature_map: (B, C, H, W).
        points_xy: (B, N, P, 2).
        padding: as there.

    Returns:
        Of the map, channels last in memory, and of the points.
    """
    values, border = at_least_fp32(feature_map), int(padding == "border")
    by_map, by_grid = torch.ops.aten.grid_sampler_2d_backward(
        gradient.permute(0, 3, 1, 2).to(values.dtype),  # (B, C, N, P)
        values,
        _place(points_xy, values.dtype),
        0,  # bilinear
        border,
        False,  # align_corners
        (True, True),
    )
    by_points = torch.where(points_xy.isfinite(), 2.0 * by_grid, 0.0).to(points_xy.dtype)
    by_cells = by_map.to(feature_map.dtype).permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
    return by_cells.permute(0, 3, 1, 2), by_points
