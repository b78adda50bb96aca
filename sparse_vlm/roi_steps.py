"""What a focusing step does with RoIs: place points, move, encode.

In PyTorch's words (:mod:`sparse_vlm.rois`, the reference) each is some ten operations on a few numbers a
token, whose launches cost a GPU more than their arithmetic. On CUDA, for inference, each is one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rois
from .agreement import AskedOnce, agree, build_drawer, has_kernels, may_infer
from .rois import at_least_fp32

_EPS = 1e-5
# Largest difference to the plain path, as a share of the largest value.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def place_points(rois_xyxy: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """See :func:`sparse_vlm.rois.place_points`.

    Args:
        rois_xyxy: (B, N, 4).
        offsets: (B, N, P, 2), without their bias.
        bias: (P, 2).

    Returns:
        Points in xy fractions, (B, N, P, 2), fp32.
    """
    if _fits(rois_xyxy, offsets, bias) and _place_agrees(offsets.device, offsets.dtype, offsets.shape[-2]):
        from .roi_kernel import launch_place

        return launch_place(rois_xyxy, offsets, bias, _EPS)
    return rois.place_points(rois_xyxy, at_least_fp32(bias) + at_least_fp32(offsets), _EPS)


def adjust_rois(rois_xyxy: Tensor, deltas: Tensor) -> Tensor:
    """See :func:`sparse_vlm.rois.adjust_rois`: (B, N, 4) and (B, N, 4) to (B, N, 4), fp32."""
    if _fits(rois_xyxy, deltas) and _adjust_agrees(deltas.device, deltas.dtype):
        from .roi_kernel import launch_adjust

        return launch_adjust(rois_xyxy, deltas)
    return rois.adjust_rois(rois_xyxy, deltas)


def encode_rois(rois_xyxy: Tensor, width: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """See :func:`sparse_vlm.rois.encode_rois`: (B, N, 4) to (B, N, width), rounded to ``dtype``."""
    kind = rois_xyxy.device, dtype, width, temperature
    if _fits(rois_xyxy) and dtype in _TOLERANCE and _encode_agrees(*kind):
        from .roi_kernel import launch_encode

        return launch_encode(rois_xyxy, width, temperature, dtype)
    return rois.encode_rois(rois_xyxy, width, temperature).to(dtype)


def _fits(rois_xyxy: Tensor, *others: Tensor) -> bool:
    return (
        may_infer(rois_xyxy)
        and rois_xyxy.dtype == torch.float32
        and all(has_kernels(other) and other.dtype in _TOLERANCE for other in others)
    )


@AskedOnce
def _place_agrees(device: torch.device, dtype: torch.dtype, points: int) -> bool:
    draw, draw_half = build_drawer(device, torch.float32), build_drawer(device, dtype)
    boxes, offsets, bias = draw(2, 9, 4), draw_half(2, 9, points, 2), draw(points, 2)

    def kernel() -> tuple[Tensor]:
        from .roi_kernel import launch_place

        return (launch_place(boxes, offsets, bias, _EPS),)

    return agree(
        "the kernel of sampling points",
        kernel,
        lambda: (rois.place_points(boxes, bias + at_least_fp32(offsets), _EPS),),
        _TOLERANCE[torch.float32],
    )


@AskedOnce
def _adjust_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    boxes, deltas = build_drawer(device, torch.float32)(2, 9, 4), build_drawer(device, dtype)(2, 9, 4)

    def kernel() -> tuple[Tensor]:
        from .roi_kernel import launch_adjust

        return (launch_adjust(boxes, deltas),)

    return agree(
        "the kernel that moves RoIs",
        kernel,
        lambda: (rois.adjust_rois(boxes, deltas),),
        _TOLERANCE[torch.float32],
    )


@AskedOnce
def _encode_agrees(device: torch.device, dtype: torch.dtype, width: int, temperature: float) -> bool:
    boxes = build_drawer(device, torch.float32)(2, 9, 4)

    def kernel() -> tuple[Tensor]:
        from .roi_kernel import launch_encode

        return (launch_encode(boxes, width, temperature, dtype),)

    return agree(
        "the kernel of position codes",
        kernel,
        lambda: (rois.encode_rois(boxes, width, temperature).to(dtype),),
        _TOLERANCE[dtype],
    )
