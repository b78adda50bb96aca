"""The SparseFormer: few tokens from the first layer on."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_vlm.encoder import SparseFormer

from .base import Seen, Tower, TowerError


class SparseFormerTower(Tower):
    """An encoder, called with N; its class token is one of them.

    Args:
        encoder: the encoder.
        num_tokens: N.

    Raises:
        TowerError: if the encoder cannot run with N.
    """

    name = "sparseformer"

    def __init__(self, encoder: SparseFormer, num_tokens: int) -> None:
        super().__init__()
        config = encoder.config
        if num_tokens < 1 + int(config.cls_token):
            raise TowerError(f"a SparseFormer with a class token makes 2 tokens or more, not {num_tokens}")
        if config.token_embedding == "per_token" and num_tokens != encoder.num_tokens:
            raise TowerError(f"this encoder makes {encoder.num_tokens} tokens and no other number")
        self.encoder = encoder.requires_grad_(False).eval()
        self.num_tokens = num_tokens
        self.width = config.width

    @torch.no_grad()
    def look(self, images: Tensor) -> Seen:
        """See :class:`Tower`."""
        return Seen(self.encoder(images, num_tokens=self.num_tokens).tokens)
