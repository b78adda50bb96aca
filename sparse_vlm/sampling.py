"""Reading a feature map at the tokens' sampling points.

PyTorch's own read-out (:mod:`sparse_vlm.sampling_plain`) is the reference. On CUDA its gradient adds up one
channel at a time, all over the memory; there two Triton kernels read and add up all channels of a cell
together, after they have agreed with the plain path on a first small problem.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sampling_operator import Sample, fits
from .sampling_plain import sample_plain


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
    if fits(feature_map, points_xy):
        samples: Tensor = Sample.apply(feature_map, points_xy, padding)
        return samples
    return sample_plain(feature_map, points_xy, padding)
