"""The Triton kernels behind :mod:`sparse_vlm.roi_steps`; imported only where they are to run."""

# ruff: noqa: N803 - constants of a kernel are written in capitals, sizes by their letter.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rois import build_frequencies
from .sampling_kernel import launching_on

_TOKENS = 16  # of one program that places points
_BLOCK = 256  # tokens of one program that moves RoIs, numbers of one that encodes them


@triton.jit
def place_kernel(  # type: ignore[no-untyped-def]
    rois, offsets, bias, points, total, count, eps, TOKENS: tl.constexpr, P: tl.constexpr
) -> None:
    """The points of TOKENS tokens: offsets centred, in units of three standard deviations, within the RoI."""
    token, point = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, P)
    there, real = token < total, point < count
    known = there[:, None] & real[None, :]
    roi = rois + 4 * token.to(tl.int64)
    for axis in tl.static_range(2):
        place = (2 * count * token.to(tl.int64))[:, None] + (2 * point + axis)[None, :]
        values = tl.load(offsets + place, known, 0.0).to(tl.float32)
        values += tl.load(bias + 2 * point + axis, real, 0.0).to(tl.float32)[None, :]
        values = tl.where(known, values, 0.0)
        values = tl.where(known, values - (tl.sum(values, 1) / count)[:, None], 0.0)
        spread = tl.sqrt(tl.sum(values * values, 1) / (count - 1)) + eps
        low, high = tl.load(roi + axis, there, 0.0), tl.load(roi + axis + 2, there, 0.0)
        values = values / (3.0 * spread)[:, None] * (high - low)[:, None] + ((low + high) * 0.5)[:, None]
        tl.store(points + place, values, known)


@triton.jit
def adjust_kernel(rois, deltas, adjusted, total, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """BLOCK RoIs: shifted by shares of their size, and resized."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = token < total
    for axis in tl.static_range(2):
        place = 4 * token + axis
        low, high = tl.load(rois + place, there, 0.0), tl.load(rois + place + 2, there, 0.0)
        size = tl.abs(high - low)
        centre = (low + high) * 0.5 + tl.load(deltas + place, there, 0.0).to(tl.float32) * size
        half = size * tl.exp(tl.load(deltas + place + 2, there, 0.0).to(tl.float32)) * 0.5
        tl.store(adjusted + place, centre - half, there)
        tl.store(adjusted + place + 2, centre + half, there)


@triton.jit
def encode_kernel(rois, frequencies, code, total, width, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """BLOCK numbers of the position code."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < total
    quarter, eighth = width // 4, width // 8
    # (token, coordinate) and the place in its quarter: first the sines, then the cosines.
    coordinate, within = place // quarter, (place % quarter).to(tl.int32)
    cosine = within >= eighth
    wave = 2 * tl.where(cosine, within - eighth, within) + tl.where(cosine, 1, 0)
    angle = tl.load(rois + coordinate, there, 0.0) * 3.1415927410125732  # pi as fp32 has it
    angle *= tl.load(frequencies + wave, there, 0.0)
    # Whole turns go away in three steps, since some sines (a GPU's own) are exact near zero only.
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    angle = angle - turns * 6.28125
    angle = angle - turns * 0.0019350051879882812
    angle = angle - turns * 3.019915981956753e-07
    tl.store(code + place, tl.where(cosine, tl.cos(angle), tl.sin(angle)).to(code.dtype.element_ty), there)


def launch_place(rois_xyxy: Tensor, offsets: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Points (B, N, P, 2), fp32, by RoIs (B, N, 4), fp32, offsets (B, N, P, 2) and their bias (P, 2)."""
    points = torch.empty(offsets.shape, dtype=torch.float32, device=offsets.device)
    batch, tokens, count, _ = offsets.shape
    if points.numel():
        with launching_on(points.device):
            place_kernel[(triton.cdiv(batch * tokens, _TOKENS),)](
                rois_xyxy.contiguous(),
                offsets.contiguous(),
                bias.contiguous(),
                points,
                batch * tokens,
                count,
                eps,
                TOKENS=_TOKENS,
                P=triton.next_power_of_2(count),
                num_warps=4,
            )
    return points


def launch_adjust(rois_xyxy: Tensor, deltas: Tensor) -> Tensor:
    """RoIs (B, N, 4), fp32, by RoIs (B, N, 4), fp32, and deltas (B, N, 4)."""
    adjusted = torch.empty(rois_xyxy.shape, dtype=torch.float32, device=rois_xyxy.device)
    total = adjusted.numel() // 4
    if total:
        with launching_on(adjusted.device):
            adjust_kernel[(triton.cdiv(total, _BLOCK),)](
                rois_xyxy.contiguous(), deltas.contiguous(), adjusted, total, BLOCK=_BLOCK, num_warps=4
            )
    return adjusted


def launch_encode(rois_xyxy: Tensor, width: int, temperature: float, dtype: torch.dtype) -> Tensor:
    """Codes (B, N, width) of RoIs (B, N, 4), fp32."""
    code = torch.empty(*rois_xyxy.shape[:2], width, dtype=dtype, device=rois_xyxy.device)
    if code.numel():
        frequencies = build_frequencies(width, temperature, torch.float32, code.device)
        with launching_on(code.device):
            encode_kernel[(triton.cdiv(code.numel(), _BLOCK),)](
                rois_xyxy.contiguous(), frequencies, code, code.numel(), width, BLOCK=_BLOCK, num_warps=4
            )
    return code
