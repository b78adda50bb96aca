"""A teacher's ViT, opened: attention and keys of its blocks can be seen, and tokens merged inside.

The blocks are those of :mod:`sparse_vlm.layers` with the teacher's weights, whatever library it came from, so
that every tower runs, and is counted and timed, over the same implementation.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bootstrap.teacher import Teacher, inherit_teacher, spec_to_config
from sparse_vlm.encoder import SparseFormer
from sparse_vlm.inherit import InheritPlan
from sparse_vlm.layers import TransformerBlock

from .base import Seen, TowerError, Want


class OpenedVit(nn.Module):
    """The ViT up to the output of its last block but one: the state that LLaVA reads.

    Args:
        teacher: any frozen teacher.

    Raises:
        TowerError: for a ViT of one block.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.spec = teacher.spec
        depth = self.spec.depth
        if depth < 2:
            raise TowerError(f"teacher {self.spec.name} has {depth} block; LLaVA reads the last but one")
        self.trunk = teacher.trunk
        encoder = SparseFormer(spec_to_config(self.spec, drop=0), self.spec.transform)
        inherit_teacher(encoder, teacher, InheritPlan(depth, 0, 0, depth))
        self.blocks = encoder.cortex.blocks.to(device=teacher.device, dtype=teacher.dtype)
        self.requires_grad_(False).eval()

    @property
    def num_patches(self) -> int:
        """P."""
        return self.spec.grid[0] * self.spec.grid[1]

    @property
    def used_blocks(self) -> list[TransformerBlock]:
        """The blocks that run: all but the last."""
        return [cast(TransformerBlock, block) for block in self.blocks[:-1]]

    def embed(self, images: Tensor) -> Tensor:
        """Pictures to the tokens that enter the first block, (B, prefix + P, D)."""
        return self.trunk.embed(images)

    @torch.no_grad()
    def look(self, images: Tensor, wants: Collection[Want] = ()) -> Seen:
        """Look at pictures.

        Args:
            images: (B, 3, H, W), prepared by the teacher's transform.
            wants: "penultimate" and "last": also the attention and the keys of those blocks; "draws".
        """
        prefix = self.spec.num_prefix
        tokens = self.embed(images)
        *before, penultimate = self.used_blocks
        for block in before:
            tokens = block(tokens)
        attention = keys = last_attention = last_keys = draws = None
        if "penultimate" in wants:
            # The block's own query and key, so that nothing is computed, and counted, twice.
            query, key, value = split_qkv(penultimate, tokens)
            attention = self._received(query, key).mean(dim=1)[:, prefix:]
            keys = key.mean(dim=1)[:, prefix:]  # (B, P, D/K)
            tokens = attend(penultimate, tokens, query, key, value, None)
            tokens = tokens + penultimate.ls2(penultimate.mlp(penultimate.norm2(tokens)))
        else:
            tokens = penultimate(tokens)
        if "last" in wants:
            query, key = project_query_key(cast(TransformerBlock, self.blocks[-1]), tokens)
            last_attention = self._received(query[:, None], key[:, None])[:, 0, prefix:]
            last_keys = key[:, prefix:]
        if "draws" in wants:
            draws = torch.tensor([zlib.crc32(picture.cpu().numpy().tobytes()) for picture in images])
        class_token = tokens[:, :1] if self.spec.has_cls else None
        return Seen(tokens[:, prefix:], class_token, attention, keys, last_attention, last_keys, draws)

    def _received(self, query: Tensor, key: Tensor) -> Tensor:
        """Attention (B, K, T) that every token gets: from the class token, or without one from all."""
        if self.spec.has_cls:
            query = query[:, :, :1]
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
        return weights.mean(dim=2)


def project_query_key(block: TransformerBlock, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key of a block's attention, heads side by side, each (B, T, D); the value is not computed."""
    packed = block.attn.qkv
    rows = 2 * tokens.shape[-1]
    bias = None if packed.bias is None else packed.bias[:rows]
    query, key = F.linear(block.norm1(tokens), packed.weight[:rows], bias).chunk(2, dim=-1)
    return query, key


def split_qkv(block: TransformerBlock, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a block's attention, each (B, K, T, D/K)."""
    batch, count, width = tokens.shape
    attention = block.attn
    packed = attention.qkv(block.norm1(tokens))
    packed = packed.reshape(batch, count, 3, attention.heads, width // attention.heads)  # (B, T, 3, K, D/K)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def attend(
    block: TransformerBlock, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor, sizes: Tensor | None
) -> Tensor:
    """The attention branch of a block; with sizes (B, T), tokens count as often as they have patches."""
    bias = None if sizes is None else sizes.log()[:, None, None, :].to(query.dtype)  # (B, 1, 1, T)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return tokens + block.ls1(block.attn.proj(mixed.transpose(1, 2).flatten(2)))  # (B, T, D)
