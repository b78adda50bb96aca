"""The Triton kernels behind :mod:`sparse_vlm.norms`; imported only where they are to run."""

# ruff: noqa: N803 - constants of a kernel are written in capitals.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling_kernel import launching_on

_CELLS = 32  # map cells of one program


@triton.jit
def add_norm_kernel(  # type: ignore[no-untyped-def]
    tokens, update, weight, bias, added, normed, width, eps, WIDTH: tl.constexpr, ADD: tl.constexpr
) -> None:
    """One token: add its update, and normalise the sum."""
    channel = tl.arange(0, WIDTH)
    known = channel < width
    place = tl.program_id(0).to(tl.int64) * width + channel
    values = tl.load(tokens + place, known, 0.0).to(tl.float32)
    if ADD:
        values += tl.load(update + place, known, 0.0).to(tl.float32)
        rounded = values.to(added.dtype.element_ty)
        tl.store(added + place, rounded, known)
        values = rounded.to(tl.float32)  # what the plain path would normalise
    centred = tl.where(known, values - tl.sum(values, 0) / width, 0.0)
    values = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    values = values * tl.load(weight + channel, known, 0.0).to(tl.float32)
    values += tl.load(bias + channel, known, 0.0).to(tl.float32)
    tl.store(normed + place, values.to(normed.dtype.element_ty), known)


@triton.jit
def pool_norm_kernel(  # type: ignore[no-untyped-def]
    features,
    bias,
    normed,
    height,
    width,
    pooled_height,
    pooled_width,
    channels,
    eps,
    CELLS: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """CELLS cells of one picture: the largest of 3 x 3, bias, ReLU, layer norm."""
    blocks = tl.cdiv(pooled_height * pooled_width, CELLS)
    picture, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    cell, channel = block * CELLS + tl.arange(0, CELLS), tl.arange(0, C)
    there = cell < pooled_height * pooled_width
    known = there[:, None] & (channel < channels)[None, :]
    row, column = 2 * (cell // pooled_width) - 1, 2 * (cell % pooled_width) - 1
    largest = tl.full((CELLS, C), float("-inf"), tl.float32)
    for down in tl.static_range(3):
        for along in tl.static_range(3):
            y, x = row + down, column + along
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            place = ((picture * height + y) * width + x)[:, None] * channels + channel[None, :]
            values = tl.load(features + place, known & inside[:, None], float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, values, propagate_nan=tl.PropagateNan.ALL)
    values = largest + tl.load(bias + channel, channel < channels, 0.0).to(tl.float32)[None, :]
    values = values.to(normed.dtype.element_ty).to(tl.float32)  # what the plain path would normalise
    values = tl.where(known, tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
    centred = tl.where(known, values - (tl.sum(values, 1) / channels)[:, None], 0.0)
    values = centred * tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)[:, None]
    place = (picture * pooled_height * pooled_width + cell)[:, None] * channels + channel[None, :]
    tl.store(normed + place, values.to(normed.dtype.element_ty), known)


def launch_add_norm(
    tokens: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums of contiguous tensors (..., D), or the tokens themselves without an update, and their norms."""
    normed = torch.empty_like(tokens)
    added = tokens if update is None else torch.empty_like(tokens)
    if tokens.numel():
        width = tokens.shape[-1]
        padded = triton.next_power_of_2(width)
        with launching_on(tokens.device):
            add_norm_kernel[(tokens.numel() // width,)](
                tokens,
                tokens if update is None else update,
                weight.contiguous(),
                bias.contiguous(),
                added,
                normed,
                width,
                eps,
                WIDTH=padded,
                ADD=update is not None,
                num_warps=min(max(padded // 256, 1), 8),
            )
    return added, normed


def launch_pool_norm(features: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(B, C, H, W) to (B, C, H/2, W/2), both channels last."""
    batch, channels, height, width = features.shape
    pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
    normed = features.new_empty(batch, pooled_height, pooled_width, channels)
    if normed.numel():
        cells = features.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C): no copy of a channels-last map
        with launching_on(features.device):
            pool_norm_kernel[(batch * triton.cdiv(pooled_height * pooled_width, _CELLS),)](
                cells,
                bias.contiguous(),
                normed,
                height,
                width,
                pooled_height,
                pooled_width,
                channels,
                eps,
                CELLS=_CELLS,
                C=triton.next_power_of_2(channels),
                num_warps=4,
            )
    return normed.permute(0, 3, 1, 2)  # (B, C, H/2, W/2)
