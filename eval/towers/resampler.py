"""A resampler: N learned queries read the ViT's tokens through one cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Seen
from .full import VitTower
from .opened import OpenedVit


class ResamplerTower(VitTower):
    """Learned queries, one multi-head cross-attention, trained together with the projector.

    Args:
        vit: the opened teacher.
        num_tokens: N.
        seed: of the initial weights, which are drawn apart from everything else's.
    """

    name = "resampler"
    trained = "queries and cross-attention"

    def __init__(self, vit: OpenedVit, num_tokens: int, seed: int = 0) -> None:
        super().__init__(vit, num_tokens)
        width = self.width
        self.heads = vit.spec.heads
        self.queries = nn.Parameter(torch.empty(num_tokens, width))
        self.norm = nn.LayerNorm(width)
        with torch.random.fork_rng(devices=[]):
            self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.queries.normal_(std=1.0, generator=generator)
            for linear in (self.query, self.key, self.value, self.proj):
                linear.weight.normal_(std=width**-0.5, generator=generator)
                linear.bias.zero_()

    def reduce(self, seen: Seen) -> Tensor:
        """See :class:`Tower`."""
        tokens = self.norm(seen.tokens)
        batch = tokens.shape[0]
        query = self.query(self.queries).expand(batch, -1, -1)
        parts = (query, self.key(tokens), self.value(tokens))
        split = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]  # (B, K, ., D/K)
        mixed = F.scaled_dot_product_attention(*split)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (B, N, D)
