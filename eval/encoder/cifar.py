"""CIFAR-10 and CIFAR-100 as their authors distribute them: the binary version."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval.answers import InputError, read_text
from eval.encoder.pictures import Pictures

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Layout:
    """The class names' file, label bytes of a record (the last one counts), and the files of each split."""

    words: str
    head: int
    files: Mapping[str, tuple[str, ...]]


_LAYOUTS = {
    "CIFAR-10": _Layout(
        "batches.meta.txt",
        1,
        {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
    ),
    "CIFAR-100": _Layout("fine_label_names.txt", 2, {"train": ("train.bin",), "test": ("test.bin",)}),
}


def find_cifar(folder: Path) -> tuple[str, Path] | None:
    """Which CIFAR lies in a folder or in one below it, and where; None if there is none.

    Raises:
        InputError: If it is the Python version.
    """
    for place in (folder, *sorted(folder.glob("cifar-*"))):
        for name, layout in _LAYOUTS.items():
            if (place / layout.words).is_file():
                return name, place
        if any((place / name).is_file() for name in ("batches.meta", "test_batch", "meta")):
            raise InputError(
                f"{place} is CIFAR's Python version, which is a pickle; take the binary version "
                "(cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)."
            )
    return None


def load_cifar(name: str, folder: Path, split: str = "test") -> Pictures:
    """One split: records of label bytes and 3,072 pixel bytes, channel by channel.

    Args:
        name: "CIFAR-10" or "CIFAR-100".
        folder: With its files.
        split: "train" or "test".

    Raises:
        InputError: If a file is missing or not whole.
    """
    layout = _LAYOUTS[name]
    words, head = layout.words, layout.head
    parts = []
    for file in layout.files[split]:
        path = folder / file
        if not path.is_file():
            raise InputError(f"{folder} lacks {name}'s {file}.")
        data = np.fromfile(path, dtype=np.uint8)
        if not data.size or data.size % (head + _PIXEL_BYTES):
            raise InputError(f"{path} has {data.size} bytes, which is no whole number of CIFAR records.")
        parts.append(data.reshape(-1, head + _PIXEL_BYTES))
    rows = np.concatenate(parts)
    classes = tuple(line.strip() for line in read_text(folder / words).split("\n") if line.strip())
    labels = tuple(int(label) for label in rows[:, head - 1])
    if max(labels) >= len(classes):
        raise InputError(f"{folder / words} names {len(classes)} classes, and a label is {max(labels)}.")

    def read(place: int) -> Image.Image:
        pixels = rows[place, head:].reshape(3, _SIDE, _SIDE)
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))  # (H, W, 3)

    stamp = hashlib.sha256(rows.tobytes()).hexdigest()
    names = tuple(f"{split}#{place}" for place in range(len(rows)))
    return Pictures(f"{name} {split}", names, read, labels, classes, stamp, "cifar")
