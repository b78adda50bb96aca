"""The full ViT: every patch is a token."""

from __future__ import annotations

from torch import Tensor

from .base import EVERYTHING, Seen, Tower, TowerError
from .opened import OpenedVit


class VitTower(Tower):
    """What the towers that reduce a ViT's tokens afterwards have in common; by itself the full ViT.

    Args:
        vit: the opened teacher.
        num_tokens: N; by default all P patches.

    Raises:
        TowerError: if N is not 1 to P.
    """

    name = "vit"
    shared_look = "vit"

    def __init__(self, vit: OpenedVit, num_tokens: int | None = None) -> None:
        super().__init__()
        patches = vit.num_patches
        count = patches if num_tokens is None else num_tokens
        if not 1 <= count <= patches:
            raise TowerError(f"{self.name} makes 1 to {patches} tokens of {patches} patches, not {count}")
        self.vit = vit
        self.num_tokens = count
        self.width = vit.spec.width

    def look(self, images: Tensor) -> Seen:
        """See :class:`Tower`."""
        return self.vit.look(images, self.wants)

    def look_for_all(self, images: Tensor) -> Seen:
        """See :class:`Tower`."""
        return self.vit.look(images, EVERYTHING)
