"""Pictures and their captions: Karpathy's splits of Flickr30k and COCO, and COCO's own files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_json
from eval.encoder.pictures import Pictures, reader_of, stamp_of


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
    annotations: Path,
    images: Path,
    split: str = "test",
    limit: int | None = None,
    per_picture: int | None = None,
) -> Captioned:
    """Captioned pictures: Karpathy's Flickr30k and COCO files, lists made of them, or COCO's own captions.

    Args:
        annotations: `dataset_flickr30k.json`, `dataset_coco.json`; a list of objects with "image" and
            "caption" (`flickr30k_test.json`, `coco_karpathy_test.json`); or `captions_*.json`.
        images: Picture folder; files for COCO name folders below it.
        split: Of Karpathy's own files.
        limit: Only the first so many pictures, with all their captions.
        per_picture: Only the first so many captions of a picture.

    Raises:
        InputError: If the file is none of these, the split is empty, a picture is missing or there twice, or
            has no caption.
    """
    content = read_json(annotations)
    try:
        rows = _karpathy(content, annotations, split) or _listed(content) or _coco(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{annotations} has an entry that is not whole ({error}).") from None
    if rows is None:
        raise InputError(
            f"{annotations} is neither one of Karpathy's files (images with sentences and a split, or a list "
            "of image and caption) nor COCO's captions (images and annotations)."
        )
    strange = [name for name, _ in rows if not isinstance(name, str)]
    if strange:
        raise InputError(f"{annotations} has {len(strange)} pictures without a name ({name_some(strange)}).")
    twice = [name for name, count in Counter(name for name, _ in rows).items() if count > 1]
    if twice:
        raise InputError(f"{annotations} has {len(twice)} pictures more than once ({name_some(twice)}).")
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
    names = tuple(name for name, _ in rows)
    pictures = Pictures(str(images), names, reader_of(files), stamp=stamp_of(files))
    captions = [(place, text) for place, (_, texts) in enumerate(rows) for text in texts[:per_picture]]
    return Captioned(pictures, tuple(text for _, text in captions), tuple(place for place, _ in captions))


_Rows = list[tuple[str, list[str]]]


def _karpathy(content: Any, source: Path, split: str) -> _Rows | None:
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


def _listed(content: Any) -> _Rows | None:
    if not isinstance(content, list) or not content or "caption" not in content[0]:
        return None
    texts = [row["caption"] if isinstance(row["caption"], list) else [row["caption"]] for row in content]
    return [(row["image"], [text.strip() for text in own]) for row, own in zip(content, texts, strict=True)]


def _coco(content: Any) -> _Rows | None:
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        return None
    texts: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        if "caption" not in row:
            return None
        texts.setdefault(row["image_id"], []).append(row["caption"].strip())
    return [(image["file_name"], texts.get(image["id"], [])) for image in content["images"]]
