"""Embeddings of many pictures, made once: in batches, with a bar, bad pictures named, kept if wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from bootstrap.data.decode import BadPictureError
from eval.answers import InputError, name_some
from eval.encoder.looks import Look
from eval.encoder.pictures import Pictures
from sparse_vlm.atomic import write_atomic


@dataclass(frozen=True)
class Features:
    """Embeddings of the pictures that could be read.

    Attributes:
        values: (n, E) fp32, not normalised.
        places: Place of each among the pictures.
        bad: Names of the pictures that could not be read, with the reason.
    """

    values: Tensor
    places: tuple[int, ...]
    bad: tuple[str, ...] = ()


def extract(
    look: Look,
    pictures: Pictures,
    batch: int = 64,
    cache: Path | None = None,
    max_bad: int = 100,
    workers: int = 4,
) -> Features:
    """Embeds pictures, or reads what an earlier call with the same look and pictures has kept.

    Args:
        look: Who looks.
        pictures: At what.
        batch: Pictures at once.
        cache: Folder to keep embeddings in; None keeps none.
        max_bad: So many pictures may be unreadable; one more ends it.
        workers: Threads that read pictures while others are looked at.

    Raises:
        InputError: If too many pictures are bad, or none is good.
    """
    key = hashlib.sha256(
        json.dumps([look.stamp, pictures.source, pictures.stamp, pictures.names]).encode()
    ).hexdigest()
    path = None if cache is None else cache / f"{key[:32]}.safetensors"
    if path is not None and path.is_file():
        kept = _read(path)
        _check_bad(kept.bad, max_bad, pictures.source)
        return kept
    values: list[Tensor] = []
    places: list[int] = []
    bad: list[str] = []
    total = len(pictures.names)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, unit="picture", desc=Path(look.name).name, disable=None) as bar,
    ):
        read = partial(_read_picture, look, pictures)
        starts = range(0, total, batch)
        coming = [pool.submit(read, place) for place in range(min(batch, total))]
        for start in starts:
            now, later = coming, range(start + batch, min(start + 2 * batch, total))
            coming = [pool.submit(read, place) for place in later]  # while this batch is looked at
            pixels = []
            for place, result in enumerate((future.result() for future in now), start=start):
                if isinstance(result, Tensor):
                    pixels.append(result)
                    places.append(place)
                    continue
                bad.append(f"{pictures.names[place]}: {result}")
                if len(bad) > max_bad:
                    pool.shutdown(cancel_futures=True)
                    _check_bad(bad, max_bad, pictures.source)
            if pixels:
                values.append(look.embed(torch.stack(pixels)))
            bar.update(len(now))
    if not values:
        raise InputError(f"No picture of {pictures.source} can be read ({name_some(bad, 3)}).")
    features = Features(torch.cat(values), tuple(places), tuple(bad))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"values": features.values.contiguous(), "places": torch.tensor(features.places)}
        write_atomic(path, save(tensors, metadata={"bad": json.dumps(features.bad), "look": look.name}))
    return features


def _check_bad(bad: Sequence[str], max_bad: int, source: str) -> None:
    if len(bad) > max_bad:
        raise InputError(
            f"{len(bad)} pictures of {source} cannot be read ({name_some(bad, 3)}); {max_bad} are allowed."
        )


def _read_picture(look: Look, pictures: Pictures, place: int) -> Tensor | BadPictureError:
    try:
        return look.prepare(pictures.read(place))
    except BadPictureError as error:
        return error


def _read(path: Path) -> Features:
    with safe_open(path, "pt") as file:
        bad = tuple(json.loads(file.metadata()["bad"]))
        return Features(file.get_tensor("values"), tuple(file.get_tensor("places").tolist()), bad)
