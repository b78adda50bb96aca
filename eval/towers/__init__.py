"""Vision towers to compare, of one teacher: the full ViT, its rivals' ways to fewer tokens, and ours."""

from __future__ import annotations

from collections.abc import Callable

from sparse_vlm.encoder import SparseFormer

from .base import Seen, Tower, TowerError, join_seen
from .full import VitTower
from .opened import OpenedVit
from .ours import SparseFormerTower
from .pooling import PoolingTower
from .prumerge import PruMergeTower
from .random_tokens import RandomTower
from .resampler import ResamplerTower
from .tome import ToMeTower
from .visionzip import VisionZipTower

__all__ = ["METHODS", "OpenedVit", "Seen", "Tower", "TowerError", "build_tower", "join_seen"]

_OF_VIT: dict[str, Callable[[OpenedVit, int, int], Tower]] = {
    "vit": lambda vit, count, seed: VitTower(vit, count),
    "pool": lambda vit, count, seed: PoolingTower(vit, count),
    "random": RandomTower,
    "visionzip": lambda vit, count, seed: VisionZipTower(vit, count),
    "prumerge": lambda vit, count, seed: PruMergeTower(vit, count),
    "tome": lambda vit, count, seed: ToMeTower(vit, count),
    "resampler": ResamplerTower,
}
METHODS = (*_OF_VIT, "sparseformer")
"""Names for :func:`build_tower`."""


def build_tower(
    method: str,
    num_tokens: int,
    vit: OpenedVit,
    encoder: SparseFormer | None = None,
    seed: int = 0,
) -> Tower:
    """A tower that makes exactly N tokens.

    Args:
        method: one of :data:`METHODS`.
        num_tokens: N; for "vit" the number of patches.
        vit: the opened teacher.
        encoder: for "sparseformer".
        seed: of random choices and of weights to train.

    Raises:
        TowerError: for an unknown method, or an N that it cannot make: one above the number of patches, say.
    """
    if method == "sparseformer":
        if encoder is None:
            raise TowerError("the method sparseformer needs an encoder directory")
        return SparseFormerTower(encoder, num_tokens)
    if method not in _OF_VIT:
        raise TowerError(f"there is no method {method!r}; there are {', '.join(METHODS)}")
    if method == "vit" and num_tokens != vit.num_patches:
        raise TowerError(f"the full ViT makes {vit.num_patches} tokens, not {num_tokens}")
    return _OF_VIT[method](vit, num_tokens, seed)
