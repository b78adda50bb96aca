"""The Triton kernels behind :mod:`sparse_vlm.sampling`; imported only where they are to run."""

# ruff: noqa: N803 - constants of a kernel are written in capitals, sizes by their letter.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # points of one program


@triton.jit
def locate(place, size, ZEROS: tl.constexpr) -> tl.tensor:  # type: ignore[no-untyped-def]
    """Map coordinates of points along one direction, and their derivative by the fraction.

    What is not a number reads the middle, and stands still as what is infinite does.
    """
    finite = (place == place) & (tl.abs(place) < float("inf"))
    place = tl.where(place == place, tl.minimum(tl.maximum(place, -1e4), 1e4), 0.5)
    # In the steps of grid_sample, so that rounding falls to the same side of a cell's centre.
    place = (((place * 2.0 - 1.0) + 1.0) * size - 1.0) * 0.5
    moves = finite
    if not ZEROS:
        moves = finite & (place > 0.0) & (place < size - 1.0)
        place = tl.minimum(tl.maximum(place, 0.0), size - 1.0)
    return place, tl.where(moves, size * 1.0, 0.0)


@triton.jit
def corner(row, column, height, width) -> tl.tensor:  # type: ignore[no-untyped-def]
    """The number of a cell in its map, outside the border's, and whether it is inside."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    column = tl.minimum(tl.maximum(column, 0), width - 1)
    return row * width + column, inside


@triton.jit
def read(cells, first, x, y, known, height, width, channels, channel, ZEROS: tl.constexpr) -> tl.tensor:  # type: ignore[no-untyped-def]
    """All channels at points (R,) of the maps that begin with cell ``first``, (R, C) in fp32."""
    x, _ = locate(x, width, ZEROS)
    y, _ = locate(y, height, ZEROS)
    left, top = tl.floor(x), tl.floor(y)
    column, row = left.to(tl.int32), top.to(tl.int32)
    values = tl.zeros(known.shape, tl.float32)
    for down in tl.static_range(2):
        for along in tl.static_range(2):
            cell, inside = corner(row + down, column + along, height, width)
            across = x - left if along else left + 1.0 - x
            below = y - top if down else top + 1.0 - y
            place = ((first + cell) * channels)[:, None] + channel[None, :]
            share = tl.where(inside, across * below, 0.0)
            values += share[:, None] * tl.load(cells + place, known, 0.0).to(tl.float32)
    return values


@triton.jit
def sample_kernel(  # type: ignore[no-untyped-def]
    cells,
    points,
    samples,
    total,
    per_picture,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ZEROS: tl.constexpr,
) -> None:
    """Read ROWS points of all channels."""
    point, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    there = point < total
    known = there[:, None] & (channel < channels)[None, :]
    place = points + 2 * point.to(tl.int64)
    x, y = tl.load(place, there, 0.5), tl.load(place + 1, there, 0.5)
    first = (point // per_picture).to(tl.int64) * height * width
    values = read(cells, first, x, y, known, height, width, channels, channel, ZEROS)
    target = samples + (point.to(tl.int64) * channels)[:, None] + channel[None, :]
    tl.store(target, values.to(samples.dtype.element_ty), known)


@triton.jit
def scatter_kernel(  # type: ignore[no-untyped-def]
    gradient,
    cells,
    points,
    by_cells,
    by_points,
    total,
    per_picture,
    height,
    width,
    channels,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    ZEROS: tl.constexpr,
) -> None:
    """The gradients of ROWS samples: added to the cells they were read from, and to where they were read."""
    point, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    there = point < total
    known = there[:, None] & (channel < channels)[None, :]
    x, x_rate = locate(tl.load(points + 2 * point.to(tl.int64), there, 0.5), width, ZEROS)
    y, y_rate = locate(tl.load(points + 2 * point.to(tl.int64) + 1, there, 0.5), height, ZEROS)
    left, top = tl.floor(x), tl.floor(y)
    column, row = left.to(tl.int32), top.to(tl.int32)
    first = (point // per_picture).to(tl.int64) * height * width
    arriving = gradient + (point.to(tl.int64) * channels)[:, None] + channel[None, :]
    wanted = tl.load(arriving, known, 0.0).to(tl.float32)
    by_x, by_y = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for down in tl.static_range(2):
        for along in tl.static_range(2):
            cell, inside = corner(row + down, column + along, height, width)
            across = x - left if along else left + 1.0 - x
            below = y - top if down else top + 1.0 - y
            place = ((first + cell) * channels)[:, None] + channel[None, :]
            use = known & inside[:, None]
            agreed = tl.sum(wanted * tl.load(cells + place, use, 0.0).to(tl.float32), axis=1)
            by_x += agreed * below * (1.0 if along else -1.0)
            by_y += agreed * across * (1.0 if down else -1.0)
            tl.atomic_add(by_cells + place, wanted * (across * below)[:, None], use, sem="relaxed")
    tl.store(by_points + 2 * point.to(tl.int64), by_x * x_rate, there)
    tl.store(by_points + 2 * point.to(tl.int64) + 1, by_y * y_rate, there)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_samples(feature_map: Tensor, points_xy: Tensor, zeros: bool) -> Tensor:
    """Samples (B, N, P, C) of a map (B, C, H, W) at points (B, N, P, 2)."""
    samples = feature_map.new_empty(*points_xy.shape[:3], feature_map.shape[1])
    if samples.numel():
        sizes, constants = _describe(feature_map, points_xy, zeros)
        arguments = (_cells(feature_map), points_xy.contiguous(), samples)
        with launching_on(feature_map.device):
            sample_kernel[_grid(sizes)](*arguments, *sizes, **constants)
    return samples


def launch_gradients(
    gradient: Tensor, feature_map: Tensor, points_xy: Tensor, zeros: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of map (B, C, H, W), channels last, and points (B, N, P, 2), by those of the samples."""
    batch, channels, height, width = feature_map.shape
    by_cells = feature_map.new_zeros(batch, height, width, channels, dtype=torch.float32)
    by_points = torch.zeros_like(points_xy, memory_format=torch.contiguous_format)
    if gradient.numel():
        sizes, constants = _describe(feature_map, points_xy, zeros)
        given = (gradient.contiguous(), _cells(feature_map), points_xy.contiguous())
        with launching_on(feature_map.device):
            scatter_kernel[_grid(sizes)](*given, by_cells, by_points, *sizes, **constants)
    return by_cells.to(feature_map.dtype).permute(0, 3, 1, 2), by_points  # (B, C, H, W)


def _cells(feature_map: Tensor) -> Tensor:
    return feature_map.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C): no copy of the stem's own layout


def _describe(
    feature_map: Tensor, points_xy: Tensor, zeros: bool
) -> tuple[tuple[int, int, int, int, int], dict[str, object]]:
    _, channels, height, width = feature_map.shape
    batch, tokens, points = points_xy.shape[:3]
    sizes = (batch * tokens * points, tokens * points, height, width, channels)
    return sizes, {"ROWS": _ROWS, "C": triton.next_power_of_2(channels), "ZEROS": zeros, "num_warps": 4}


def _grid(sizes: tuple[int, ...]) -> tuple[int]:
    return (triton.cdiv(sizes[0], _ROWS),)
