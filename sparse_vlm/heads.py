"""From tokens to one embedding in the source ViT's output space."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SparseFormerConfig
from .layers import Mlp, init_modules


class AttentionPool(nn.Module):
    """One learned probe attends over the tokens, followed by an MLP on a residual branch (SigLIP).

    Args:
        config: the architecture; heads, widths and activation are the cortex'.
    """

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.probe = nn.Parameter(torch.empty(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, config.activation)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, D)."""
        batch, count, width = tokens.shape
        split = (self.heads, width // self.heads)
        query = self.q(self.probe).reshape(1, 1, *split).expand(batch, -1, -1, -1)  # (B, 1, K, D/K)
        key, value = self.kv(tokens).reshape(batch, count, 2, *split).unbind(2)  # each (B, N, K, D/K)
        pooled = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )  # (B, K, 1, D/K)
        pooled = self.proj(pooled.transpose(1, 2).reshape(batch, width))  # (B, D)
        return pooled + self.mlp(self.norm(pooled))


class Head(nn.Module):
    """Final layer norm, pooling and projection.

    Args:
        config: the architecture.
    """

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.prefix = int(config.cls_token)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.pool = AttentionPool(config) if config.pooling == "attention" else None
        self.proj = (
            nn.Linear(config.width, config.output_width, bias=config.head_bias)
            if config.output_width
            else nn.Identity()
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise everything below, in place."""
        init_modules(self)
        if self.pool is not None:
            nn.init.trunc_normal_(self.pool.probe, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise and pool.

        Args:
            tokens: (B, N, D) from the last cortex block.

        Returns:
            Normalised tokens (B, N, D) and the pooled embedding (B, E).
        """
        normed = self.norm(tokens)
        if self.pool is not None:
            pooled = self.pool(normed[:, self.prefix :])  # patches alone, as timm's
        elif self.pooling == "cls":
            pooled = normed[:, 0].clone()  # without a projection it is given out beside the tokens
        else:
            # Mean first, then the norm, and without the class token, as v1 SparseFormers and timm's
            # average-pooled ViTs do.
            pooled = self.norm(tokens[:, self.prefix :].mean(dim=1))
        return normed, self.proj(pooled)
