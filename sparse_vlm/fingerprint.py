"""Hashes of weights: how one directory refers to weights that another one holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# Libraries keep one and the same tower under these names; what else a checkpoint holds is not the tower.
_PREFIXES = ("model.vision_tower.", "vision_tower.", "vision_model.")
_IN_LLAVA = _PREFIXES[:2]
_NOT_THE_TOWER = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sample_files(paths: Iterable[Path], blocks: int = 128, block: int = 1 << 16) -> str:
    """SHA-256 over names, sizes and evenly spaced blocks of files: cheap also for a language model's.

    Training changes every weight, so that a trained model has another one; a change of single weights may
    fall between the blocks.

    Args:
        paths: The files, in any order.
        blocks: Most blocks to read of each file.
        block: Bytes of a block.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        count = min(blocks, -(-size // block))
        with path.open("rb") as file:
            for number in range(count):
                file.seek(number * max(size - block, 0) // max(count - 1, 1))
                digest.update(file.read(block))
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names: these very tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_tower(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a vision tower, equal for every file that holds it.

    A tower has the same hash alone, inside a CLIP and inside a LLaVA, in fp32 and in fp16: prefixes are
    taken off, text sides, projections and position counters are left out, and values are compared in fp16.

    Args:
        tensors: State dict of a model whose picture side it is, under the names of one library.
    """
    tower: dict[str, Tensor] = {}
    inside = [name for name in tensors if name.startswith(_IN_LLAVA)]
    for name in inside or tensors:
        tensor, bare = tensors[name], name
        for prefix in _PREFIXES:
            bare = bare.removeprefix(prefix)
        if not bare.startswith(_NOT_THE_TOWER) and not bare.endswith("position_ids"):
            tower[bare] = tensor.detach().half()
    return hash_tensors(tower)
