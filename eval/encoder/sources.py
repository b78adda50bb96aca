"""Whatever a command is pointed at: CIFAR, or a folder of pictures."""

from __future__ import annotations

from pathlib import Path

from eval.answers import InputError
from eval.encoder.cifar import find_cifar, load_cifar
from eval.encoder.pictures import Pictures, load_pictures


def open_pictures(source: Path, labels: Path | None = None, split: str = "test") -> Pictures:
    """The pictures of a folder, or a split of CIFAR's binary version.

    Args:
        source: See :func:`eval.encoder.pictures.load_pictures`; or the folder of CIFAR-10 or CIFAR-100.
        labels: JSON of file names and class indices.
        split: Of CIFAR; other folders are one split.

    Raises:
        InputError: If there are no pictures, or labels do not fit them.
    """
    cifar = find_cifar(source) if source.is_dir() else None
    if cifar is None:
        return load_pictures(source, labels)
    if labels is not None:
        raise InputError(f"{cifar[0]} has its own labels; leave out {labels}.")
    return load_cifar(*cifar, split)
