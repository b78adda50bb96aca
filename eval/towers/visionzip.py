"""VisionZip: the class token, the patches that it attends to, and the rest merged into a few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Seen, gather_tokens
from .full import VitTower

CONTEXTUAL_SHARE = 10 / 64
"""The paper's 64 tokens are 54 dominant and 10 contextual ones."""


class VisionZipTower(VitTower):
    """N = dominant + contextual tokens, after *VisionZip* (arXiv 2412.04467).

    Dominant: as in the authors' code, the class token itself, and the patches with its highest attention in
    the last block but one (mean over heads), in raster order. Contextual: of the remaining patches, evenly
    spaced ones are targets, each other one joins the target with the most similar key (mean over heads,
    cosine), and the mean of those is added to the target. Ten of 64 are contextual, and the same share of any
    other N. Without a class token, the mean attention from all patches takes its place. N = P keeps every
    patch as it is.
    """

    name = "visionzip"
    wants = frozenset({"penultimate"})

    def reduce(self, seen: Seen) -> Tensor:
        """See :class:`Tower`."""
        assert seen.attention is not None
        assert seen.keys is not None
        if self.num_tokens == seen.tokens.shape[1]:
            return seen.tokens
        first = [] if seen.class_token is None else [seen.class_token]
        contextual = round(self.num_tokens * CONTEXTUAL_SHARE)
        kept = self.num_tokens - contextual - len(first)
        ranked = seen.attention.argsort(dim=1, descending=True, stable=True)  # (B, P)
        chosen = gather_tokens(seen.tokens, ranked[:, :kept].sort(dim=1)[0])
        if not contextual:
            return torch.cat((*first, chosen), dim=1)
        rest = ranked[:, kept:].sort(dim=1)[0]
        merged = merge_rest(gather_tokens(seen.tokens, rest), gather_tokens(seen.keys, rest), contextual)
        return torch.cat((*first, chosen, merged), dim=1)  # (B, N, D)


def merge_rest(tokens: Tensor, keys: Tensor, groups: int) -> Tensor:
    """Evenly spaced targets among tokens (B, R, D), each plus the mean of its group; (B, groups, D)."""
    count = tokens.shape[1]
    targets = torch.arange(groups, device=tokens.device) * count // groups
    keys = F.normalize(keys, dim=-1)
    group = (keys @ keys[:, targets].transpose(1, 2)).argmax(dim=-1)  # (B, R)
    member = F.one_hot(group, groups).to(tokens.dtype)  # (B, R, groups)
    member[:, targets] = 0.0  # a target joins no group
    sums = member.transpose(1, 2) @ tokens
    return tokens[:, targets] + sums / member.sum(dim=1).clamp(min=1)[..., None]  # (B, groups, D)
