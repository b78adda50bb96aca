"""ToMe: tokens that are alike are merged inside the ViT, block after block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Seen, Tower, TowerError
from .opened import OpenedVit, attend, split_qkv


def plan_merges(patches: int, num_tokens: int, blocks: int) -> list[int]:
    """How many tokens to merge in each block: evenly, and where that would halve too often, earlier.

    Args:
        patches: P.
        num_tokens: N to end with.
        blocks: blocks to do it in.

    Raises:
        TowerError: if so few blocks cannot do it: one at most halves the patches.
    """
    most = [num_tokens * 2 ** (blocks - 1 - index) for index in range(blocks)]  # after each block
    if (
        not 1 <= num_tokens <= patches
        or (blocks and patches > 2 * most[0])
        or (not blocks and patches > num_tokens)
    ):
        raise TowerError(f"ToMe cannot go from {patches} to {num_tokens} tokens in {blocks} blocks")
    plan, left = [], patches
    for index in range(blocks):
        even = -(-(left - num_tokens) // (blocks - index))
        count = max(even, left - most[index])
        plan.append(count)
        left -= count
    return plan


def merge_tokens(
    tokens: Tensor, sizes: Tensor, metric: Tensor, count: int, protected: int
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: the most similar pairs between even and odd places become one token.

    Args:
        tokens: (B, T, D).
        sizes: (B, T) patches in each.
        metric: (B, T, M) whose cosine says how alike two tokens are.
        count: r, tokens to lose.
        protected: so many first tokens are left alone.

    Returns:
        Tokens (B, T - r, D), averages over their patches, in the order they had; and their sizes.

    Raises:
        TowerError: if there are fewer than r tokens in even places.
    """
    if not count:
        return tokens, sizes
    total = tokens.shape[1]
    metric = F.normalize(metric, dim=-1)
    first = protected + protected % 2  # the first even place after the protected ones
    source_places = torch.arange(first, total, 2, device=tokens.device)
    target_places = torch.arange(protected + (protected + 1) % 2, total, 2, device=tokens.device)
    if count > len(source_places) or not len(target_places):
        raise TowerError(f"ToMe cannot merge {count} of {total} tokens in one block")
    likeness = metric[:, source_places] @ metric[:, target_places].transpose(1, 2)  # (B, T/2, T/2)
    best, nearest = likeness.max(dim=-1)
    chosen = best.argsort(dim=1, descending=True, stable=True)[:, :count]  # (B, r)
    source = source_places[chosen]
    target = target_places[nearest.gather(1, chosen)]
    sums = tokens * sizes[..., None]
    wide = (*source.shape, tokens.shape[-1])
    sums = sums.scatter_add(1, target[..., None].expand(wide), sums.gather(1, source[..., None].expand(wide)))
    sizes = sizes.scatter_add(1, target, sizes.gather(1, source))
    stays = torch.ones_like(sizes, dtype=torch.bool).scatter(1, source, False)
    sums = sums[stays].view(tokens.shape[0], total - count, -1)  # (B, T - r, D)
    sizes = sizes[stays].view(tokens.shape[0], -1)
    return sums / sizes[..., None], sizes


class ToMeTower(Tower):
    """Token merging, after *Token Merging: Your ViT But Faster* (arXiv 2210.09461), without training.

    In every block that runs, between attention and MLP, the r most similar tokens are merged, by the mean of
    their keys over the heads; attention counts a token as often as it has patches (proportional attention).
    Class token and registers are left alone.

    Args:
        vit: the opened teacher.
        num_tokens: N.

    Raises:
        TowerError: if N is not within reach.
    """

    name = "tome"

    def __init__(self, vit: OpenedVit, num_tokens: int) -> None:
        super().__init__()
        self.vit = vit
        self.num_tokens = num_tokens
        self.width = vit.spec.width
        self.plan = plan_merges(vit.num_patches, num_tokens, len(vit.used_blocks))

    @torch.no_grad()
    def look(self, images: Tensor) -> Seen:
        """See :class:`Tower`."""
        return Seen(self.merge(images)[0])

    def merge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D), and how many patches are in each (B, N)."""
        prefix = self.vit.spec.num_prefix
        tokens = self.vit.embed(images)
        sizes = tokens.new_ones(tokens.shape[:2])
        merged = False
        for block, count in zip(self.vit.used_blocks, self.plan, strict=True):
            query, key, value = split_qkv(block, tokens)
            tokens = attend(block, tokens, query, key, value, sizes if merged else None)
            tokens, sizes = merge_tokens(tokens, sizes, key.mean(dim=1), count, prefix)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            merged |= count > 0
        return tokens[:, prefix:], sizes[:, prefix:]
