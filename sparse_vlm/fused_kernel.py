"""The Triton kernel behind :mod:`sparse_vlm.fused`; imported only where it is to run."""

# ruff: noqa: N803 - constants of a kernel are written in capitals, sizes by their letter.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .sampling_kernel import launching_on, read


@triton.jit
def _gelu(x) -> tl.tensor:  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def look_kernel(  # type: ignore[no-untyped-def]
    cells,
    points,
    by_channel,
    by_point,
    channel_bias,
    point_bias,
    mixed,
    tokens,
    height,
    width,
    channel_stride,
    point_stride,
    P: tl.constexpr,
    C: tl.constexpr,
    Q: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One token: read its P points, mix C channels, mix P points into Q, activate; all in registers."""
    token = tl.program_id(0)
    point, channel, out = tl.arange(0, P), tl.arange(0, C), tl.arange(0, Q)
    place = points + token.to(tl.int64) * P * 2 + point * 2
    first = (token // tokens).to(tl.int64) * height * width
    all_of_them = tl.full((P, C), True, tl.int1)
    samples = read(
        cells, first, tl.load(place), tl.load(place + 1), all_of_them, height, width, C, channel, ZEROS
    )

    kind = mixed.dtype.element_ty
    channel_matrix = tl.load(
        by_channel + token.to(tl.int64) * channel_stride + channel[:, None] * C + channel[None, :]
    )
    point_matrix = tl.load(by_point + token.to(tl.int64) * point_stride + out[:, None] * P + point[None, :])
    values = tl.dot(samples.to(kind), channel_matrix.to(kind), input_precision=PRECISION)  # (P, C)
    if BIAS:
        values = _gelu(values + tl.load(channel_bias + channel)[None, :].to(tl.float32))
    values = tl.dot(point_matrix.to(kind), values.to(kind), input_precision=PRECISION)  # (Q, C)
    if BIAS:
        values += tl.load(point_bias + out)[:, None].to(tl.float32)
    target = mixed + token.to(tl.int64) * Q * C + out[:, None] * C + channel[None, :]
    tl.store(target, _gelu(values).to(kind))


def launch(
    feature_map: Tensor,
    points_xy: Tensor,
    by_channel: Tensor,
    by_point: Tensor,
    channel_bias: Tensor | None,
    point_bias: Tensor | None,
    zeros: bool,
    exact: bool,
) -> Tensor:
    """Run the kernel on the fields of a :class:`sparse_vlm.fused.Sight`; ``exact``: no TF32."""
    batch, channels, height, width = feature_map.shape
    count, points = points_xy.shape[1:3]
    queries = by_point.shape[-2]
    mixed = feature_map.new_empty(batch, count, queries * channels)
    if mixed.numel() == 0:
        return mixed
    with launching_on(feature_map.device):
        look_kernel[(batch * count,)](
            feature_map.permute(0, 2, 3, 1).contiguous(),  # (B, H, W, C): no copy of the stem's own layout
            points_xy.contiguous(),
            by_channel,
            by_point,
            channel_bias if channel_bias is None else channel_bias.contiguous(),
            point_bias if point_bias is None else point_bias.contiguous(),
            mixed,
            count,
            height,
            width,
            by_channel.stride(1),
            by_point.stride(1),
            P=points,
            C=channels,
            Q=queries,
            ZEROS=zeros,
            BIAS=channel_bias is not None,
            PRECISION="ieee" if exact else "tf32",
            num_warps=4,
        )
    return mixed
