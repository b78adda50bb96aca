"""N patches at random: what any selection has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Seen, gather_tokens
from .full import VitTower
from .opened import OpenedVit


class RandomTower(VitTower):
    """N patch tokens drawn anew for every picture, in raster order.

    The draw is a function of the picture's pixels and the seed, so it is the same in training, in evaluation
    and in any batch.

    Args:
        vit: the opened teacher.
        num_tokens: N.
        seed: of the draws.
    """

    name = "random"
    wants = frozenset({"draws"})

    def __init__(self, vit: OpenedVit, num_tokens: int, seed: int = 0) -> None:
        super().__init__(vit, num_tokens)
        self.seed = seed

    def reduce(self, seen: Seen) -> Tensor:
        """See :class:`Tower`."""
        assert seen.draws is not None
        rows = []
        for draw in seen.draws.tolist():
            generator = torch.Generator().manual_seed((draw << 16) + self.seed)
            rows.append(
                torch.randperm(seen.tokens.shape[1], generator=generator)[: self.num_tokens].sort()[0]
            )
        return gather_tokens(seen.tokens, torch.stack(rows).to(seen.tokens.device))
