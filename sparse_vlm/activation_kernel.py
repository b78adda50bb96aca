"""The Triton kernels behind :mod:`sparse_vlm.activations`; imported only where they are to run."""

# ruff: noqa: N803 - constants of a kernel are written in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_kernel import launching_on

_BLOCK = 2048  # numbers of one program


@triton.jit
def quick_gelu_kernel(values, result, total, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """BLOCK numbers x become x * sigmoid(1.702 x)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + place, place < total, 0.0).to(tl.float32)
    tl.store(result + place, (x * tl.sigmoid(1.702 * x)).to(result.dtype.element_ty), place < total)


@triton.jit
def quick_gelu_gradient_kernel(gradient, values, result, total, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """The gradient of BLOCK numbers, by that of what became of them."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + place, place < total, 0.0).to(tl.float32)
    arriving = tl.load(gradient + place, place < total, 0.0).to(tl.float32)
    share = tl.sigmoid(1.702 * x)
    slope = share * (1.0 + 1.702 * x * (1.0 - share))
    tl.store(result + place, (arriving * slope).to(result.dtype.element_ty), place < total)


def launch_quick_gelu(values: Tensor) -> Tensor:
    """QuickGELU of a contiguous tensor."""
    result = torch.empty_like(values)
    if total := values.numel():
        with launching_on(values.device):
            quick_gelu_kernel[(triton.cdiv(total, _BLOCK),)](values, result, total, BLOCK=_BLOCK, num_warps=4)
    return result


def launch_quick_gelu_gradient(gradient: Tensor, values: Tensor) -> Tensor:
    """The gradient of contiguous ``values`` by that of their QuickGELU."""
    result = torch.empty_like(values)
    if total := values.numel():
        given = (gradient.contiguous(), values, result, total)
        with launching_on(values.device):
            quick_gelu_gradient_kernel[(triton.cdiv(total, _BLOCK),)](*given, BLOCK=_BLOCK, num_warps=4)
    return result
