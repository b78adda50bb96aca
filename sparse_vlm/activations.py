"""Activations by their names in configurations.

PyTorch has no QuickGELU of its own; written in its words it is three passes over the widest tensors of a ViT.
On CUDA it is one, by a Triton kernel, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .agreement import AskedOnce, agree, has_kernels
from .compiling import is_compiling
from .operators import register

# Largest difference to the plain path, as a share of the largest value.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    # A compiler makes one kernel of the plain words.
    if _operator is not None and _fits(x) and not is_compiling():
        activated: Tensor = _QuickGelu.apply(x) if torch.is_grad_enabled() else _operator(x)
        return activated
    return quick_gelu_plain(x)


def quick_gelu_plain(x: Tensor) -> Tensor:
    """:func:`quick_gelu` in PyTorch's words.

    Written as silu(1.702 x) / 1.702, for whose gradient one tensor is kept instead of two; but not in fp16,
    whose largest number is too near.
    """
    if x.dtype == torch.float16:
        return x * torch.sigmoid(1.702 * x)
    scaled = 1.702 * x
    if torch.is_grad_enabled() and x.requires_grad:
        return F.silu(scaled) * (1 / 1.702)
    return F.silu(scaled, inplace=True).mul_(1 / 1.702)


def quick_gelu_gradient_plain(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x`` by that of its QuickGELU, in PyTorch's words."""
    if x.dtype == torch.float16:  # whose largest number is too near
        return quick_gelu_gradient_plain(gradient.float(), x.float()).to(x.dtype)
    share = torch.sigmoid(1.702 * x)
    return gradient * share * (1.0 + 1.702 * x * (1.0 - share))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation (SigLIP)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
}


def _fits(x: Tensor) -> bool:
    return has_kernels(x) and x.dtype in _TOLERANCE and x.is_contiguous()


def _run(x: Tensor) -> Tensor:
    if _fits(x) and _agrees(x.device, x.dtype):
        from .activation_kernel import launch_quick_gelu

        return launch_quick_gelu(x)
    return quick_gelu_plain(x)


def _run_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    if _fits(x) and gradient.dtype == x.dtype and _agrees(x.device, x.dtype):
        from .activation_kernel import launch_quick_gelu_gradient

        return launch_quick_gelu_gradient(gradient, x)
    return quick_gelu_gradient_plain(gradient, x)


@AskedOnce
def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run here and say what the plain path says; asked once."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = (4.0 * torch.randn(2, 3000, generator=generator, device="cpu")).to(device, dtype).unbind(0)

    def kernels() -> tuple[Tensor, Tensor]:
        from .activation_kernel import launch_quick_gelu, launch_quick_gelu_gradient

        return launch_quick_gelu(x), launch_quick_gelu_gradient(gradient, x)

    return agree(
        "the QuickGELU kernel",
        kernels,
        # Rounded once, as the kernels do, and not at every step.
        lambda: (quick_gelu_plain(x.float()), quick_gelu_gradient_plain(gradient.float(), x.float())),
        _TOLERANCE[dtype],
    )


_operator: Any = register(__name__, "quick_gelu", "(Tensor x) -> Tensor", _run, torch.empty_like)
_gradient_operator: Any = register(
    __name__,
    "quick_gelu_gradient",
    "(Tensor gradient, Tensor x) -> Tensor",
    _run_gradient,
    lambda gradient, x: torch.empty_like(x),
)


class _QuickGelu(torch.autograd.Function):
    """The operator with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        activated: Tensor = _operator(x)
        return activated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Who wants gradients of gradients gets PyTorch's, which have some.
        by_hand: Any = quick_gelu_gradient_plain if torch.is_grad_enabled() else _gradient_operator
        wanted: Tensor = by_hand(gradients[0], *ctx.saved_tensors)
        return wanted
