"""The cortex transformer: ordinary ViT blocks over the focused tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import SparseFormerConfig
from .layers import TransformerBlock, init_modules


class CortexTransformer(nn.Module):
    """Class token, optional entry norm, and ``depth`` ViT blocks; built to inherit a ViT's weights.

    Args:
        config: the architecture.
    """

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.cls_token else None
        self.entry_norm = (
            nn.LayerNorm(config.width, eps=config.norm_eps) if config.entry_norm else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.width,
                config.heads,
                config.mlp_width,
                config.activation,
                config.norm_eps,
                config.qkv_bias,
                config.layer_scale,
            )
            for _ in range(config.depth)
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise everything below, in place."""
        init_modules(self)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(
        self, tokens: Tensor, hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Run the blocks.

        Args:
            tokens: latents, (B, N_latent, D).
            hidden_states: also return the input of the first block and the output of every block.

        Returns:
            The last block's output (B, N, D), class token first where there is one, and, if asked for, the
            L + 1 states.
        """
        if self.cls_token is not None:
            cls_token = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat((cls_token, tokens), dim=1)
        tokens = self.entry_norm(tokens)
        states = [tokens]
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if hidden_states:
                states.append(tokens)
        return tokens, tuple(states) if hidden_states else None
