"""PruMerge: the patches that the class token attends to, each with its like merged in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Seen, gather_tokens
from .full import VitTower

NEIGHBOUR_SHARE = 32 / 576
"""The authors merge 32 neighbours of 576 patches."""


class PruMergeTower(VitTower):
    """N - 1 patches and one token for what was pruned, after *LLaVA-PruMerge* (arXiv 2403.15388).

    Kept: the patches with the highest attention from the class token in the last block, whose heads are
    taken together. To each, its nearest patches by the cosine of their keys are added, weighted with their
    attention. The last token is the attention-weighted sum of all pruned patches. The paper finds the number
    of tokens from the picture; here it is N for every picture. Without a class token, the mean attention from
    all patches takes its place. N = P keeps every patch as it is.
    """

    name = "prumerge"
    wants = frozenset({"last"})

    def reduce(self, seen: Seen) -> Tensor:
        """See :class:`Tower`."""
        assert seen.last_attention is not None
        assert seen.last_keys is not None
        tokens, weights = seen.tokens, seen.last_attention
        patches, kept = tokens.shape[1], self.num_tokens - 1
        if self.num_tokens == patches:
            return tokens
        ranked = weights.argsort(dim=1, descending=True, stable=True)  # (B, P)
        index = ranked[:, :kept].sort(dim=1)[0]
        weighted = tokens * weights[..., None]
        pruned = ranked[:, kept:]
        last = gather_tokens(weighted, pruned).sum(dim=1, keepdim=True)  # (B, 1, D)
        if not kept:
            return last
        keys = F.normalize(seen.last_keys, dim=-1)
        likeness = gather_tokens(keys, index) @ keys.transpose(1, 2)  # (B, N - 1, P)
        likeness.scatter_(2, index[..., None], -torch.inf)  # a patch is no neighbour of itself
        neighbours = min(patches - 1, max(1, round(patches * NEIGHBOUR_SHARE)))
        near = likeness.topk(neighbours, dim=2)[1]
        member = torch.zeros_like(likeness).scatter_(2, near, 1.0)
        return torch.cat((gather_tokens(tokens, index) + member @ weighted, last), dim=1)  # (B, N, D)
