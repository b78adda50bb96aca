"""VisionZip: the patches that the class token attends to, and the rest merged into a few."""

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

    Dominant: patches with the highest attention from the class token in the last block but one (mean over
    heads), in raster order. Contextual: of the remaining patches, evenly spaced ones are targets, each other
    one joins the target with the most similar key (cosine), and a group is averaged. Ten of 64 are
    contextual, and the same share of any other N. Without a class token, the mean attention from all patches
    takes its place.
    """

    name = "visionzip"
    wants = frozenset({"penultimate"})

    def reduce(self, seen: Seen) -> Tensor:
        """See :class:`Tower`."""
        assert seen.attention is not None
        assert seen.keys is not None
        patches = seen.tokens.shape[1]
        contextual = min(round(self.num_tokens * CONTEXTUAL_SHARE), patches - self.num_tokens)
        ranked = seen.attention.argsort(dim=1, descending=True, stable=True)  # (B, P)
        dominant = ranked[:, : self.num_tokens - contextual].sort(dim=1)[0]
        chosen = gather_tokens(seen.tokens, dominant)
        if not contextual:
            return chosen
        rest = ranked[:, self.num_tokens - contextual :].sort(dim=1)[0]
        merged = merge_rest(gather_tokens(seen.tokens, rest), gather_tokens(seen.keys, rest), contextual)
        return torch.cat((chosen, merged), dim=1)  # (B, N, D)


def merge_rest(tokens: Tensor, keys: Tensor, groups: int) -> Tensor:
    """Averages tokens (B, R, D) in groups around evenly spaced targets; (B, groups, D)."""
    count = tokens.shape[1]
    targets = torch.arange(groups, device=tokens.device) * count // groups
    keys = F.normalize(keys, dim=-1)
    likeness = keys @ keys[:, targets].transpose(1, 2)  # (B, R, groups)
    group = likeness.argmax(dim=-1)
    group[:, targets] = torch.arange(groups, device=tokens.device)  # a target stays with itself
    member = F.one_hot(group, groups).to(tokens.dtype)  # (B, R, groups)
    return (member.transpose(1, 2) @ tokens) / member.sum(dim=1)[..., None]  # (B, groups, D)
