"""Region-of-interest geometry: where tokens start, move, and put their sampling points.

Every function here works in fp32 (fp64 if given that) whatever the model's precision: in bf16 a coordinate
near 1 has a resolution of 1/256 of the picture, a quarter of a feature-map cell at 224 pixels, and every step
would add to the error. Coordinates are fractions of the picture; RoIs are (x1, y1, x2, y2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def at_least_fp32(values: Tensor) -> Tensor:
    """Half precisions become fp32; fp32 and fp64 stay."""
    return values if values.dtype == torch.float64 else values.float()


def build_initial_rois(num_latents: int, layout: str, device: torch.device | str | None = None) -> Tensor:
    """The RoIs that tokens start from.

    ``"half"`` is the layout of the published models: the largest square number of tokens takes a grid of RoIs
    half the picture wide, the others see the whole picture (48 is a 6x6 grid and 12 whole pictures). Tokens
    that share their embedding and their RoI stay equal for ever, so those 12 count as one.

    ``"tiles"`` cuts the picture into as many tiles as there are tokens, in rows of (nearly) equal number, so
    that together they see everything and no two are equal (48 is six rows of seven and one of six).

    Args:
        num_latents: how many RoIs, at least one.
        layout: ``"half"`` or ``"tiles"``.
        device: where to build them.

    Returns:
        RoIs in xyxy fractions, (N, 4), fp32.
    """
    if num_latents < 1:
        raise ValueError(f"num_latents must be at least 1, got {num_latents}")
    if layout == "tiles":
        return _cut_tiles(num_latents, device)
    side = math.isqrt(num_latents)
    rois = torch.zeros(num_latents, 4, dtype=torch.float32, device=device)
    rois[:, 2:] = 1.0
    if side == 1:
        return rois
    size = 0.5
    # Dividing the index (rather than linspace) keeps the corners exactly as the published models have them.
    corner = torch.arange(side, dtype=torch.float32, device=device) / (side - 1) * (1.0 - size)
    y1, x1 = torch.meshgrid(corner, corner, indexing="ij")
    x1y1 = torch.stack((x1, y1), dim=-1).reshape(side * side, 2)  # (side², 2)
    rois[: side * side] = torch.cat((x1y1, x1y1 + size), dim=-1)
    return rois


def _cut_tiles(count: int, device: torch.device | str | None) -> Tensor:
    # Made where it is needed: a copy from the host would not fit into a CUDA graph.
    rows = round(math.sqrt(count))
    tiles = []
    for row in range(rows):
        columns = count // rows + (row < count % rows)
        x1 = torch.arange(columns, dtype=torch.float32, device=device)
        y1 = torch.full_like(x1, row)
        tiles.append(torch.stack((x1 / columns, y1 / rows, (x1 + 1) / columns, (y1 + 1) / rows), dim=-1))
    return torch.cat(tiles)  # (N, 4)


def adjust_rois(rois_xyxy: Tensor, deltas: Tensor) -> Tensor:
    """Move and resize RoIs: the centre shifts by delta times the size, the size grows by exp(delta).

    Args:
        rois_xyxy: (B, N, 4).
        deltas: (B, N, 4): shift in x, shift in y, log-scale of width, log-scale of height.

    Returns:
        New RoIs, (B, N, 4), fp32.
    """
    rois_xyxy, deltas = at_least_fp32(rois_xyxy), at_least_fp32(deltas)
    centre = (rois_xyxy[..., :2] + rois_xyxy[..., 2:]) * 0.5
    size = (rois_xyxy[..., 2:] - rois_xyxy[..., :2]).abs()
    centre = centre + deltas[..., :2] * size
    half = size * deltas[..., 2:].exp() * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)


def place_points(rois_xyxy: Tensor, offsets: Tensor, eps: float = 1e-5) -> Tensor:
    """Turn raw point offsets into sampling points inside each token's RoI.

    A token's offsets are centred and divided by three times their own standard deviation, so nearly all of
    them fall into the RoI however large the raw values are.

    Args:
        rois_xyxy: (B, N, 4).
        offsets: (B, N, P, 2) or broadcastable to it, P at least two.
        eps: added to the standard deviation.

    Returns:
        Points in xy fractions, (B, N, P, 2), fp32.
    """
    rois_xyxy, offsets = at_least_fp32(rois_xyxy), at_least_fp32(offsets)
    mean = offsets.mean(dim=-2, keepdim=True)
    spread = offsets.std(dim=-2, keepdim=True) + eps
    centre = (rois_xyxy[..., :2] + rois_xyxy[..., 2:]) * 0.5
    size = rois_xyxy[..., 2:] - rois_xyxy[..., :2]
    return centre.unsqueeze(-2) + (offsets - mean) / (3.0 * spread) * size.unsqueeze(-2)  # (B, N, P, 2)


def encode_rois(rois_xyxy: Tensor, width: int, temperature: float) -> Tensor:
    """Sines and cosines of the four RoI coordinates, at frequencies from pi to pi times ``temperature``.

    The code is a label for the attention, not a path for gradients: RoIs are detached, as in the published
    models, and learn through the sampling alone.

    Args:
        rois_xyxy: (B, N, 4).
        width: width of the code, a multiple of eight.
        temperature: the highest frequency over the lowest.

    Returns:
        (B, N, width), fp32: for each coordinate its sines, then its cosines.
    """
    rois_xyxy = at_least_fp32(rois_xyxy.detach())
    frequencies = build_frequencies(width, temperature, rois_xyxy.dtype, rois_xyxy.device)
    angles = (rois_xyxy * math.pi).unsqueeze(-1) * frequencies  # (B, N, 4, width/4)
    code = torch.cat((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1)  # (B, N, 4, width/4)
    return code.flatten(-2)  # (B, N, width)


def build_frequencies(width: int, temperature: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The frequencies of :func:`encode_rois` in units of pi, (width/4,): sines have the even ones."""
    return torch.linspace(0.0, math.log(temperature), width // 4, dtype=dtype, device=device).exp()
