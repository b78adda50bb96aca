"""Layer norms together with what comes before them.

PyTorch makes several passes over memory of an addition and a norm, or of pooling, bias, ReLU and a norm. On
CUDA, for inference, each is one Triton kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .agreement import AskedOnce, agree, build_drawer, has_kernels, may_infer

# Largest difference to the plain path, as a share of the largest value.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_POOL_EPS = 1e-5


def add_norm(tokens: Tensor, update: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Add an update to the tokens, and normalise the sum.

    Args:
        tokens: (B, N, D).
        update: the same, or None for nothing.
        norm: a layer norm, or what somebody has put into its place.

    Returns:
        The sum and its norm, each (B, N, D).
    """
    if isinstance(norm, nn.LayerNorm) and _fits_add(tokens, update, norm):
        from .norm_kernel import launch_add_norm

        return launch_add_norm(tokens, update, norm.weight, norm.bias, norm.eps)
    if update is not None:
        tokens = tokens + update
    return tokens, norm(tokens)


def pool_norm(features: Tensor, bias: Tensor) -> Tensor:
    """3x3 stride-2 max-pool, bias, ReLU, layer norm per map cell without gain or bias.

    Args:
        features: (B, C, H, W).
        bias: (C,).

    Returns:
        (B, C, ceil(H/2), ceil(W/2)).
    """
    fits = _may_run(features) and has_kernels(bias) and bias.dtype == features.dtype
    if fits and _pool_agrees(*_kind(features, 1)):
        from .norm_kernel import launch_pool_norm

        return launch_pool_norm(features, bias, _POOL_EPS)
    return pool_norm_plain(features, bias)


def pool_norm_plain(features: Tensor, bias: Tensor) -> Tensor:
    """:func:`pool_norm` step by step: the reference."""
    # Pooling first: a maximum commutes with bias and ReLU and leaves them a quarter of the cells.
    pooled = F.max_pool2d(features, 3, stride=2, padding=1).permute(0, 2, 3, 1)  # (B, H/2, W/2, C)
    normed = F.layer_norm(F.relu(pooled + bias), (pooled.shape[-1],), eps=_POOL_EPS)
    return normed.permute(0, 3, 1, 2)  # (B, C, H/2, W/2)


def _may_run(tensor: Tensor) -> bool:
    """Whether the kernels may be asked of a tensor of this kind."""
    return (
        may_infer(tensor)
        and tensor.dtype in _TOLERANCE
        and not torch.is_autocast_enabled()  # under which norms give fp32
    )


def _fits_add(tokens: Tensor, update: Tensor | None, norm: nn.LayerNorm) -> bool:
    return (
        _may_run(tokens)
        # Whoever brings its weights for its call only, or watches it, must see it called.
        and type(norm) is nn.LayerNorm
        and not (norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm))
        and norm.normalized_shape == tokens.shape[-1:]
        and norm.weight is not None
        and norm.bias is not None
        and norm.weight.dtype == norm.bias.dtype == tokens.dtype
        and norm.weight.device == norm.bias.device == tokens.device
        and has_kernels(norm.weight)
        and has_kernels(norm.bias)
        and tokens.is_contiguous()
        and (update is None or (update.is_contiguous() and update.shape == tokens.shape))
        and (update is None or update.dtype == tokens.dtype)
        and _add_agrees(*_kind(tokens, -1))
    )


def _kind(tensor: Tensor, axis: int) -> tuple[torch.device, torch.dtype, int]:
    return tensor.device, tensor.dtype, tensor.shape[axis]


@AskedOnce
def _add_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel runs here and says what the plain path says; asked once for each width."""
    draw = build_drawer(device, dtype)
    tokens, update, weight, bias = draw(2, 3, width), draw(2, 3, width), draw(width), draw(width)

    def kernel() -> tuple[Tensor, ...]:
        from .norm_kernel import launch_add_norm

        _, alone = launch_add_norm(tokens, None, weight, bias, 1e-5)
        return *launch_add_norm(tokens, update, weight, bias, 1e-5), alone

    def plain() -> tuple[Tensor, ...]:
        added = tokens + update
        return added, *(F.layer_norm(x, (width,), weight, bias) for x in (added, tokens))

    return agree("the kernel of sums and norms", kernel, plain, _TOLERANCE[dtype])


@AskedOnce
def _pool_agrees(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether the kernel runs here and says what the plain path says; asked once for each width."""
    draw = build_drawer(device, dtype)
    features, bias = draw(2, 7, 10, channels).permute(0, 3, 1, 2), draw(channels)

    def kernel() -> tuple[Tensor]:
        from .norm_kernel import launch_pool_norm

        return (launch_pool_norm(features, bias, _POOL_EPS),)

    return agree(
        "the kernel of pooling and norm",
        kernel,
        lambda: (pool_norm_plain(features, bias),),
        _TOLERANCE[dtype],
    )
