"""Pictures with what is known of them: class folders, labelled folders, CIFAR, captioned pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bootstrap.data.decode import decode_picture
from eval.answers import InputError, name_some, read_text

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_NUMBERED = re.compile(r"(\d+)_.+")
_PIXELS = 80_000_000


@dataclass(frozen=True)
class Pictures:
    """Pictures in a fixed order.

    Attributes:
        source: Where they come from.
        names: One each.
        read: Opens the picture of a place; raises bootstrap's `BadPictureError` for a broken one.
        labels: Class index of each; None where none are known.
        classes: Class names that the files themselves give, in the order of the labels.
        stamp: Changes when a picture may have changed.
    """

    source: str
    names: tuple[str, ...]
    read: Callable[[int], Image.Image]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    stamp: str = ""

    def first(self, limit: int | None) -> Pictures:
        """The first so many; of labelled pictures, evenly over the classes."""
        if limit is None or limit >= len(self.names):
            return self
        places = list(range(limit))
        if self.labels is not None:
            seen: dict[int, int] = {}
            rank = []
            for place, label in enumerate(self.labels):
                rank.append((seen.get(label, 0), place))
                seen[label] = seen.get(label, 0) + 1
            places = sorted(place for _, place in sorted(rank)[:limit])
        return self.at(places)

    def at(self, places: Sequence[int]) -> Pictures:
        """Some of them."""
        return Pictures(
            self.source,
            tuple(self.names[place] for place in places),
            lambda place: self.read(places[place]),
            None if self.labels is None else tuple(self.labels[place] for place in places),
            self.classes,
            self.stamp,
        )


def load_pictures(source: Path, labels: Path | None = None) -> Pictures:
    """Pictures of a folder or an archive of CIFAR, with their labels.

    Args:
        source: A folder of class folders; a folder of pictures named like `207_golden_retriever.jpg`; any
            folder of pictures, with `labels`; or the folder of CIFAR-10's or CIFAR-100's binary version.
        labels: JSON of file names and class indices, or with these under "labels".

    Raises:
        InputError: If there are no pictures, or labels do not fit them.
    """
    if not source.is_dir():
        raise InputError(f"There is no folder of pictures {source}.")
    if _is_cifar(source):
        return _load_cifar(source)
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"{source} holds no pictures ({', '.join(sorted(_SUFFIXES))}).")
    names = tuple(str(path.relative_to(source)) for path in files)
    known, classes = _find_labels(source, names, labels)
    stamp = f"{sum(p.stat().st_size for p in files)}/{max(p.stat().st_mtime_ns for p in files)}"

    def read(place: int) -> Image.Image:
        return decode_picture(files[place].read_bytes(), _PIXELS)

    return Pictures(str(source), names, read, known, classes, stamp)


def _find_labels(
    source: Path, names: tuple[str, ...], labels: Path | None
) -> tuple[tuple[int, ...] | None, tuple[str, ...] | None]:
    if labels is not None:
        try:
            table = json.loads(read_text(labels))
        except json.JSONDecodeError as error:
            raise InputError(f"{labels} is not JSON ({error}).") from None
        table = table.get("labels", table) if isinstance(table, dict) else {}
        missing = [name for name in names if name not in table]
        if missing:
            raise InputError(
                f"{labels} says nothing about {len(missing)} pictures of {source} ({name_some(missing)})."
            )
        return tuple(int(table[name]) for name in names), None
    folders = [Path(name).parts[0] if len(Path(name).parts) > 1 else None for name in names]
    if all(folders):
        classes = tuple(sorted({str(folder) for folder in folders}))
        index = {name: place for place, name in enumerate(classes)}
        return tuple(index[str(folder)] for folder in folders), classes
    numbers = [_NUMBERED.fullmatch(Path(name).stem) for name in names]
    if all(numbers):
        return tuple(int(match[1]) for match in numbers if match), None
    return None, None


def _is_cifar(folder: Path) -> bool:
    inner = [folder, *folder.glob("cifar-*-batches-bin"), *folder.glob("cifar-100-binary")]
    if any((place / name).is_file() for place in inner for name in ("test_batch.bin", "test.bin")):
        return True
    if (folder / "test_batch").is_file() or (folder / "batches.meta").is_file():
        raise InputError(
            f"{folder} is CIFAR's Python version, which is a pickle; take the binary version "
            "(cifar-10-binary.tar.gz, cifar-100-binary.tar.gz)."
        )
    return False


def _load_cifar(folder: Path) -> Pictures:
    """The test split of CIFAR's binary version: label bytes, then 3,072 pixel bytes, channel by channel."""
    places = [folder, *sorted(folder.glob("cifar-*"))]
    root = next(p for p in places if (p / "test_batch.bin").is_file() or (p / "test.bin").is_file())
    hundred = (root / "test.bin").is_file()
    path = root / ("test.bin" if hundred else "test_batch.bin")
    words = root / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    head = 2 if hundred else 1
    data = np.fromfile(path, dtype=np.uint8)
    if not data.size or data.size % (head + 3072):
        raise InputError(f"{path} has {data.size} bytes, which is no whole number of CIFAR records.")
    rows = data.reshape(-1, head + 3072)

    def read(place: int) -> Image.Image:
        return Image.fromarray(rows[place, head:].reshape(3, 32, 32).transpose(1, 2, 0))  # (H, W, 3)

    classes = tuple(line.strip() for line in read_text(words).split("\n") if line.strip())
    labels = tuple(int(label) for label in rows[:, head - 1])
    names = tuple(f"{path.name}#{place}" for place in range(len(rows)))
    return Pictures(str(path), names, read, labels, classes, f"{data.size}")


@dataclass(frozen=True)
class Captioned:
    """Pictures and their captions.

    Attributes:
        pictures: The pictures.
        captions: All captions.
        owners: Place of the picture that each caption is of.
    """

    pictures: Pictures
    captions: tuple[str, ...]
    owners: tuple[int, ...]


def load_captioned(
    annotations: Path, images: Path, split: str = "test", limit: int | None = None
) -> Captioned:
    """Captioned pictures: Karpathy's Flickr30k and COCO files, or COCO's own captions file.

    Args:
        annotations: `dataset_flickr30k.json`, `dataset_coco.json`, or `captions_*.json`.
        images: Picture folder; Karpathy's COCO file names folders below it.
        split: Of Karpathy's files.
        limit: Only the first so many pictures, with all their captions.

    Raises:
        InputError: If the file is none of these, the split is empty, or pictures are missing.
    """
    try:
        content = json.loads(read_text(annotations))
    except json.JSONDecodeError as error:
        raise InputError(f"{annotations} is not JSON ({error}).") from None
    rows = _karpathy(content, annotations, split) or _coco(content)
    if rows is None:
        raise InputError(
            f"{annotations} is neither one of Karpathy's files (images with sentences and a split) nor "
            "COCO's captions (images and annotations)."
        )
    rows = rows[:limit]
    missing = [name for name, _ in rows if not (images / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} pictures of {annotations} are not in {images} ({name_some(missing)})."
        )
    bare = [name for name, captions in rows if not captions]
    if bare:
        raise InputError(f"{len(bare)} pictures of {annotations} have no caption ({name_some(bare)}).")
    files = [images / name for name, _ in rows]
    stamp = f"{sum(path.stat().st_size for path in files)}/{max(path.stat().st_mtime_ns for path in files)}"
    pictures = Pictures(
        str(images),
        tuple(name for name, _ in rows),
        lambda place: decode_picture(files[place].read_bytes(), _PIXELS),
        stamp=stamp,
    )
    captions = [(place, text) for place, (_, texts) in enumerate(rows) for text in texts]
    return Captioned(pictures, tuple(text for _, text in captions), tuple(place for place, _ in captions))


def _karpathy(content: Any, source: Path, split: str) -> list[tuple[str, list[str]]] | None:
    images = content.get("images") if isinstance(content, dict) else None
    if not images or "sentences" not in images[0]:
        return None
    chosen = [image for image in images if image.get("split") == split]
    if not chosen:
        found = sorted({str(image.get("split")) for image in images})
        raise InputError(f"{source} has no split {split!r}; it has {', '.join(found)}.")
    return [
        (
            str(Path(image.get("filepath", "")) / image["filename"]),
            [sentence["raw"].strip() for sentence in image["sentences"]],
        )
        for image in chosen
    ]


def _coco(content: Any) -> list[tuple[str, list[str]]] | None:
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return None
    texts: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        if "caption" not in row:
            return None
        texts.setdefault(row["image_id"], []).append(row["caption"].strip())
    return [(image["file_name"], texts.get(image["id"], [])) for image in content["images"]]
