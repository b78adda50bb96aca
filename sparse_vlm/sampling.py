"""Reading a feature map at the tokens' sampling points."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rois import at_least_fp32


class _ClampGradient(torch.autograd.Function):
    """Identity whose gradient is clamped to ±limit."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, limit: float) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(-ctx.limit, ctx.limit), None


def sample_features(
    feature_map: Tensor, points_xy: Tensor, padding: str = "border", clip_gradients: bool = False
) -> Tensor:
    """Bilinear read-out of a feature map.

    The arithmetic is fp32 at least (see :mod:`sparse_vlm.rois`); the result has the map's dtype again.

    Args:
        feature_map: (B, C, H, W).
        points_xy: (B, N, P, 2), fractions of the picture: (0, 0) is its upper left corner, (1, 1) its lower
            right one, as in ``align_corners=False``.
        padding: ``"border"`` or ``"zeros"``: what a point outside the picture reads.
        clip_gradients: clamp the points' gradients to ±1/H in both directions, as v1 SparseFormers were
            trained.

    Returns:
        (B, N, P, C).
    """
    if clip_gradients:
        points_xy = _ClampGradient.apply(points_xy, 1.0 / feature_map.shape[-2])
    values = at_least_fp32(feature_map)
    # A diverged model's coordinates are not numbers, and grid_sample's gradient on the CPU then writes
    # outside its memory. Read the middle instead: the tokens carry their NaN on, so the loss still shows it.
    grid = torch.nan_to_num(points_xy.to(values.dtype) * 2.0 - 1.0, nan=0.0, posinf=1e4, neginf=-1e4)
    sampled = F.grid_sample(
        values, grid, mode="bilinear", padding_mode=padding, align_corners=False
    )  # (B, C, N, P)
    return sampled.permute(0, 2, 3, 1).to(feature_map.dtype)  # (B, N, P, C)
