"""Encoder directories as LLaVA's configs name them: by path, and by the hash of their weights."""

from __future__ import annotations

import functools
import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

TOWER_FOLDER = "vision_tower"
_MODEL_TYPE = "sparseformer_vision"  # sparse_vlm.checkpoint.MODEL_TYPE, without importing torch


def is_encoder(name: Any) -> bool:
    """Whether a tower name is the path of an encoder directory."""
    if not isinstance(name, (str, PathLike)) or not name:
        return False
    return _read_config(Path(name)).get("model_type") == _MODEL_TYPE


def find_encoder(name: Any, args: Any) -> Path | None:
    """The encoder directory that a model's arguments or config mean, or None if they mean another tower.

    A checkpoint with a tuned tower of its own names it by its full path; after such a checkpoint was moved,
    the folder beside its config is taken.

    Raises:
        FileNotFoundError: if the tower was an encoder directory once and is gone.
    """
    if is_encoder(name):
        return Path(name)
    if getattr(args, "mm_vision_tower_sha256", None) is None:
        return None
    beside = Path(getattr(args, "_name_or_path", None) or ".") / TOWER_FOLDER
    if is_encoder(beside):
        return beside
    raise FileNotFoundError(
        f"the vision tower of this checkpoint, the encoder directory {name}, is not there any more; put it "
        'back, or write its new path into "mm_vision_tower" of the checkpoint\'s config.json'
    )


def check_fingerprint(directory: Path, args: Any) -> None:
    """Hold the weights against the hash in a checkpoint's config, where there is one.

    Raises:
        ValueError: if they are other weights than the checkpoint was trained with.
    """
    expected = getattr(args, "mm_vision_tower_sha256", None)
    if expected is not None and expected != read_fingerprint(directory):
        raise ValueError(
            f"{directory} holds other weights than the vision tower this checkpoint was trained with (sha256 "
            f"of model.safetensors should be {expected}); put the right encoder directory there, or write "
            'its path into "mm_vision_tower" of the checkpoint\'s config.json'
        )


def check_width(directory: Path, wanted: int | None, projector: str) -> None:
    """Hold the width of an encoder's tokens against the width that a projector takes.

    Args:
        directory: the encoder directory.
        wanted: the projector's input width; None where none is known yet.
        projector: what to call it in a complaint.

    Raises:
        ValueError: if they differ.
    """
    width = _read_config(directory).get("architecture", {}).get("width")
    if wanted is not None and width is not None and wanted != width:
        raise ValueError(
            f"{projector} takes visual tokens of width {wanted}, the encoder {directory} has tokens of width "
            f"{width}: name the encoder it was trained with, or train a projector for this one (LLaVA's "
            "pre-training stage, without --pretrain_mm_mlp_adapter)"
        )


def read_fingerprint(directory: Path, of_checkpoint: bool = False) -> str | None:
    """The hash of an encoder directory's weights, or the one written in a LLaVA checkpoint's config.

    Args:
        directory: the encoder directory or checkpoint.
        of_checkpoint: which of the two it is.

    Returns:
        A hexadecimal SHA-256; None if a checkpoint names none.
    """
    if of_checkpoint:
        return _read_config(directory).get("mm_vision_tower_sha256")
    path = directory.resolve() / "model.safetensors"
    state = path.stat()
    return _hash(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _hash(path: Path, modified: int, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
