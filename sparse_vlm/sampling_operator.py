"""Sampling as an operator with gradients: two Triton kernels where they run and agree with the plain path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .agreement import AskedOnce, agree, has_kernels
from .compiling import TRACES_FUNCTIONS, is_compiling, is_exporting
from .operators import register
from .sampling_plain import sample_gradients_plain, sample_plain

# Largest difference to the plain path, as a share of the largest value.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def fits(feature_map: Tensor, points_xy: Tensor) -> bool:
    """Whether the kernels can take these tensors."""
    return (
        _operator is not None
        and has_kernels(feature_map)
        and feature_map.dtype in _TOLERANCE
        and points_xy.dtype == torch.float32
        # Sums of gradients come in any order, here as in PyTorch; who forbids that is told by PyTorch.
        and not torch.are_deterministic_algorithms_enabled()
        and not is_exporting()
        and (TRACES_FUNCTIONS or not is_compiling())
    )


def _sample(feature_map: Tensor, points_xy: Tensor, padding: str) -> Tensor:
    if _agrees(feature_map.device, feature_map.dtype, feature_map.shape[1], padding):
        from .sampling_kernel import launch_samples

        return launch_samples(feature_map, points_xy, padding == "zeros")
    return sample_plain(feature_map, points_xy, padding).contiguous()


def _sample_shape(feature_map: Tensor, points_xy: Tensor, padding: str) -> Tensor:
    return feature_map.new_empty(*points_xy.shape[:3], feature_map.shape[1])


def _gradients(
    gradient: Tensor, feature_map: Tensor, points_xy: Tensor, padding: str
) -> tuple[Tensor, Tensor]:
    """Gradients of map and points by those of the samples, (B, N, P, C)."""
    if _agrees(feature_map.device, feature_map.dtype, feature_map.shape[1], padding):
        from .sampling_kernel import launch_gradients

        return launch_gradients(gradient, feature_map, points_xy, padding == "zeros")
    return sample_gradients_plain(gradient, feature_map, points_xy, padding)


def _gradients_shape(
    gradient: Tensor, feature_map: Tensor, points_xy: Tensor, padding: str
) -> tuple[Tensor, Tensor]:
    by_map = torch.empty_like(feature_map, memory_format=torch.channels_last)
    return by_map, torch.empty_like(points_xy, memory_format=torch.contiguous_format)


_operator = register(
    __name__,
    "sample",
    "(Tensor feature_map, Tensor points_xy, str padding) -> Tensor",
    _sample,
    _sample_shape,
)
_gradients_operator: Any = register(
    __name__,
    "sample_gradients",
    "(Tensor gradient, Tensor feature_map, Tensor points_xy, str padding) -> (Tensor, Tensor)",
    _gradients,
    _gradients_shape,
)


class Sample(torch.autograd.Function):
    """The operator with its gradients: ``Sample.apply(feature_map, points_xy, padding)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(feature_map: Tensor, points_xy: Tensor, padding: str) -> Tensor:
        samples: Tensor = _operator(feature_map, points_xy, padding)  # type: ignore[misc]
        return samples

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.padding = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        # Who wants gradients of gradients gets PyTorch's, which have some.
        by_hand: Any = sample_gradients_plain if torch.is_grad_enabled() else _gradients_operator
        by_map, by_points = by_hand(gradients[0], *ctx.saved_tensors, ctx.padding)
        return by_map, by_points, None


@AskedOnce
def _agrees(device: torch.device, dtype: torch.dtype, channels: int, padding: str) -> bool:
    """Whether the kernels run here and say what the plain path says; asked once for each kind of problem."""
    feature_map, points_xy, gradient = build_problem(device, dtype, channels)

    def kernels() -> tuple[Tensor, ...]:
        from .sampling_kernel import launch_gradients, launch_samples

        zeros = padding == "zeros"
        by_map, by_points = launch_gradients(gradient, feature_map, points_xy, zeros)
        return launch_samples(feature_map, points_xy, zeros), by_map, by_points

    def plain() -> tuple[Tensor, ...]:
        by_map, by_points = sample_gradients_plain(gradient, feature_map, points_xy, padding)
        return sample_plain(feature_map, points_xy, padding), by_map, by_points

    return agree("the sampling kernel", kernels, plain, _TOLERANCE[dtype])


def build_problem(
    device: torch.device | str, dtype: torch.dtype, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A small map, points in and around it, and gradients of the samples; no global random state moves."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 5, 7, channels, generator=generator, device="cpu")
    feature_map = cells.permute(0, 3, 1, 2)  # (B, C, H, W)
    points_xy = torch.rand(2, 3, 9, 2, generator=generator, device="cpu") * 1.6 - 0.3
    gradient = torch.randn(2, 3, 9, channels, generator=generator, device="cpu")
    return feature_map.to(device, dtype), points_xy.to(device), gradient.to(device, dtype)
