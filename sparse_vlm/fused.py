"""One token's look as one kernel: read its points, mix channels, mix points, activate.

Plain PyTorch writes the samples, both products and the activation to memory and launches some twenty kernels
a look. :func:`look_plain` is that path and the reference; :func:`look_fused` does the same in one Triton
kernel; :func:`look` chooses. The kernel is used for inference on CUDA only, where sizes fit it, and only
after it has agreed with the plain path on a first small problem of the same kind. ``torch.compile`` sees one
operator and chooses when that runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .agreement import AskedOnce, agree, has_kernels
from .compiling import is_compiling, is_exporting
from .operators import register
from .sampling import sample_features

# Largest difference to the plain path, as a share of the largest value.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_TF32 = 2e-3


class Sight(NamedTuple):
    """What a look takes.

    Attributes:
        feature_map: (B, C, H, W).
        points_xy: (B, N, P, 2), fractions of the picture.
        by_channel: (B, N, C, C).
        by_point: (B, N, Q, P).
        channel_bias: (C,) or None, see :func:`mix_samples`.
        point_bias: (Q,) or None.
    """

    feature_map: Tensor
    points_xy: Tensor
    by_channel: Tensor
    by_point: Tensor
    channel_bias: Tensor | None = None
    point_bias: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(P, C, Q)."""
        return self.points_xy.shape[-2], self.feature_map.shape[1], self.by_point.shape[-2]


def mix_samples(
    samples: Tensor,
    by_channel: Tensor,
    by_point: Tensor,
    channel_bias: Tensor | None = None,
    point_bias: Tensor | None = None,
) -> Tensor:
    """Mix every token's samples with its own two matrices.

    Args:
        samples: (B, N, P, C).
        by_channel: (B, N, C, C).
        by_point: (B, N, Q, P).
        channel_bias: (C,), followed by an activation, or None.
        point_bias: (Q,), given where ``channel_bias`` is.

    Returns:
        (B, N, QC), activated.
    """
    # One by one: torch 2.1 does not compile the unpacking of a generator.
    mixed = samples.flatten(0, 1)  # (BN, P, C)
    first = by_channel.flatten(0, 1)  # (BN, C, C)
    second = by_point.flatten(0, 1)  # (BN, Q, P)
    if channel_bias is not None and point_bias is not None:
        mixed = F.gelu(torch.bmm(mixed, first) + channel_bias)
        mixed = torch.bmm(second, mixed) + point_bias.unsqueeze(-1)
    else:
        mixed = torch.bmm(second, torch.bmm(mixed, first))
    batch, tokens, _, channels = samples.shape  # named, not left to be found: a batch may be empty
    return F.gelu(mixed).reshape(batch, tokens, by_point.shape[-2] * channels)  # (B, N, QC)


def look(sight: Sight, padding: str = "border", clip_gradients: bool = False) -> Tensor:
    """Read a feature map at the tokens' points and mix what was read.

    Args:
        sight: map, points and mixing weights.
        padding: what points outside the picture read, see :func:`sparse_vlm.sampling.sample_features`.
        clip_gradients: clamp the points' gradients, see there.

    Returns:
        (B, N, QC).
    """
    if is_compiling():
        if _look_operator is not None and not is_exporting() and _fits(sight):
            return _look_operator(*sight, padding)
    elif _fits(sight):
        return _choose(sight, padding)
    return look_plain(sight, padding, clip_gradients)


def _choose(sight: Sight, padding: str) -> Tensor:
    """:func:`look` without gradients, for tensors that fit the kernel."""
    if _agrees(*_kind(sight), padding):
        return look_fused(sight, padding)
    return look_plain(sight, padding)


def look_plain(sight: Sight, padding: str = "border", clip_gradients: bool = False) -> Tensor:
    """:func:`look` step by step: the reference."""
    samples = sample_features(sight.feature_map, sight.points_xy, padding, clip_gradients)
    return mix_samples(samples, *sight[2:])


def look_fused(sight: Sight, padding: str = "border") -> Tensor:
    """:func:`look` in one Triton kernel; without gradients."""
    from .fused_kernel import launch

    return launch(*sight, padding == "zeros", is_exact(sight.feature_map.dtype))


def _fits(sight: Sight) -> bool:
    """Whether the kernel can take these tensors."""
    if not has_kernels(sight.feature_map) or torch.is_grad_enabled():
        return False
    by_channel, by_point = sight.by_channel, sight.by_point
    points, channels, _ = sizes = sight.sizes
    return (
        sight.feature_map.dtype in _TOLERANCE
        and by_channel.dtype == by_point.dtype == sight.feature_map.dtype
        and sight.points_xy.dtype == torch.float32
        and all(16 <= size <= 128 and size & (size - 1) == 0 for size in sizes)
        # One token's matrices lie together; tokens may be further apart than that.
        and by_channel.stride()[2:] == (channels, 1)
        and by_point.stride()[2:] == (points, 1)
        and by_channel.stride(0) == by_channel.shape[1] * by_channel.stride(1)
        and by_point.stride(0) == by_point.shape[1] * by_point.stride(1)
        and (sight.channel_bias is None) == (sight.point_bias is None)
    )


def _kind(sight: Sight) -> tuple[torch.device, torch.dtype, tuple[int, int, int], bool, bool]:
    feature_map, bias = sight.feature_map, sight.channel_bias is not None
    return feature_map.device, feature_map.dtype, sight.sizes, bias, is_exact(feature_map.dtype)


def is_exact(dtype: torch.dtype) -> bool:
    """Whether CUDA's products of fp32 numbers are to be fp32's, and not TF32's."""
    matmul = torch.backends.cuda.matmul
    try:
        precision = matmul.fp32_precision  # since torch 2.9, which refuses to mix the two
    except (AttributeError, AssertionError):
        precision = "none"
    return dtype == torch.float32 and (not matmul.allow_tf32 if precision == "none" else precision == "ieee")


@AskedOnce
def _agrees(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    bias: bool,
    exact: bool,
    padding: str,
) -> bool:
    """Whether the kernel runs here and says what the plain path says; asked once for each kind of problem."""
    problem = build_problem(device, dtype, sizes, bias)
    return agree(
        "the fused look",
        lambda: [look_fused(problem, padding)],
        lambda: [look_plain(problem, padding)],
        _TF32 if dtype == torch.float32 and not exact else _TOLERANCE[dtype],
    )


def build_problem(
    device: torch.device | str, dtype: torch.dtype, sizes: tuple[int, int, int], bias: bool
) -> Sight:
    """A small argument for :func:`look`, points outside the picture included; no global random state moves.

    Args:
        device: where.
        dtype: of map and matrices.
        sizes: (P, C, Q).
        bias: with biases.
    """
    points, channels, queries = sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device="cpu")).to(device=device, dtype=dtype)

    # Channels last, as the stem leaves it.
    feature_map = draw(2, 5, 7, channels).permute(0, 3, 1, 2)  # (B, C, H, W)
    points_xy = (torch.rand(2, 3, points, 2, generator=generator, device="cpu") * 1.6 - 0.3).to(device)
    return Sight(
        feature_map,
        points_xy,
        draw(2, 3, channels, channels, scale=channels**-0.5),
        draw(2, 3, queries, points, scale=points**-0.5),
        draw(channels) if bias else None,
        draw(queries) if bias else None,
    )


def _run(*arguments: Any) -> Tensor:
    sight, padding = Sight(*arguments[:-1]), arguments[-1]
    # A compiler may have laid the tensors out in another way.
    return _choose(sight, padding) if _fits(sight) else look_plain(sight, padding)


def _shape(*arguments: Any) -> Tensor:
    sight = Sight(*arguments[:-1])
    batch, tokens = sight.points_xy.shape[:2]
    _, channels, queries = sight.sizes
    return sight.feature_map.new_empty(batch, tokens, queries * channels)


_look_operator = register(
    __name__,
    "look",
    "(Tensor feature_map, Tensor points_xy, Tensor by_channel, Tensor by_point, "
    "Tensor? channel_bias, Tensor? point_bias, str padding) -> Tensor",
    _run,
    _shape,
)
