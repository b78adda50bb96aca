"""A resampler: N learned queries read the ViT's tokens through one cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Seen
from .full import VitTower
from .opened import OpenedVit
from .pooling import choose_grid

_BASE = 10_000.0
# Of places beside contents: enough for a query to begin as average pooling does, around its own place.
_WEIGHT = 2.0


class ResamplerTower(VitTower):
    """Learned queries and one multi-head cross-attention, trained together with the projector.

    After the resampler of *Qwen-VL* (arXiv 2308.12966): fixed sine and cosine places in two dimensions are
    added to queries and keys. They weigh more here, and query and key start from the same weights, so that a
    query begins with the patches around its own place: a short training gets further from there.

    Args:
        vit: the opened teacher.
        num_tokens: N.
        seed: of the initial weights, which are drawn apart from everything else's.
    """

    name = "resampler"
    trained = "queries and cross-attention"

    def __init__(self, vit: OpenedVit, num_tokens: int, seed: int = 0) -> None:
        super().__init__(vit, num_tokens)
        width, grid = self.width, vit.spec.grid
        self.heads = vit.spec.heads
        self.queries = nn.Parameter(torch.empty(num_tokens, width))
        self.norm, self.query_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        places = encode_places(spread_places(choose_grid(num_tokens, grid) or (1, num_tokens)), width)
        self.register_buffer("query_places", places, persistent=False)
        self.register_buffer("key_places", encode_places(spread_places(grid), width), persistent=False)
        self.query_places: Tensor
        self.key_places: Tensor
        with torch.random.fork_rng(devices=[]):
            self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.queries.normal_(std=0.02, generator=generator)
            for linear in (self.query, self.key, self.value, self.proj):
                linear.weight.normal_(std=width**-0.5, generator=generator)
                linear.bias.zero_()
            self.key.weight.copy_(self.query.weight)

    def reduce(self, seen: Seen) -> Tensor:
        """See :class:`Tower`."""
        tokens = self.norm(seen.tokens)
        batch = tokens.shape[0]
        query = self.query(self.query_norm(self.queries) + self.query_places).expand(batch, -1, -1)
        parts = (query, self.key(tokens + self.key_places), self.value(tokens))
        split = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]  # (B, K, ., D/K)
        mixed = F.scaled_dot_product_attention(*split)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (B, N, D)


def spread_places(grid: tuple[int, int]) -> Tensor:
    """Centres of a grid's cells in raster order, (cells, 2) as x and y in fractions of the picture."""
    height, width = grid
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack((x.flatten(), y.flatten()), dim=1)  # (cells, 2)


def encode_places(places: Tensor, width: int, cells: float = 16.0) -> Tensor:
    """Sines and cosines of places (n, 2), (n, D): half of the channels for x, half for y.

    Args:
        places: fractions of the picture.
        width: D; channels that do not divide by four stay zero.
        cells: the picture's side in units of the highest frequency.
    """
    count = width // 4
    rates = _BASE ** -(torch.arange(count) / count)
    angles = places[:, :, None] * cells * rates  # (n, 2, D/4)
    encoded = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (n, D)
    return _WEIGHT * F.pad(encoded, (0, width - encoded.shape[1]))
