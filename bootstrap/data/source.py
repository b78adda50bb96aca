"""What a source of pictures is, and how it is split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np


@runtime_checkable
class PictureSource(Protocol):
    """Encoded pictures with random access: a folder, local tars, a dataset on disk.

    Attributes:
        title: what to call the source in messages.
    """

    title: str

    def __len__(self) -> int:
        """Number of pictures."""

    def read(self, index: int) -> bytes:
        """The encoded picture.

        Raises:
            BadPictureError: it cannot be read.
        """

    def name(self, index: int) -> str:
        """Path or key of a picture, to find it again."""

    def fingerprint(self) -> str:
        """Changes when pictures are added, removed or reordered."""


class Streamed(Protocol):
    """One picture read off a shard."""

    @property
    def member(self) -> int:
        """Position of the picture in its shard."""

    @property
    def name(self) -> str:
        """Shard and key."""

    @property
    def data(self) -> bytes:
        """The encoded picture."""


@runtime_checkable
class ShardSource(Protocol):
    """Encoded pictures that can only be read shard by shard: remote or compressed tars.

    Attributes:
        title: what to call the source in messages.
        shards: where each shard is, sorted.
    """

    title: str
    shards: Sequence[str]

    def stream(self, shard: int, start: int = 0) -> Iterator[Streamed]:
        """Pictures of one shard from number `start` on, in the shard's order."""

    def fingerprint(self) -> str:
        """Changes when shards are added or removed."""


@runtime_checkable
class OnDisk(Protocol):
    """A source that can say which files it reads."""

    def files(self) -> Iterable[Path]:
        """Pictures, tars or tables on this disk."""


AnySource: TypeAlias = "PictureSource | ShardSource"


class SubsetSource:
    """Some pictures of another source.

    Args:
        source: the whole.
        chosen: which of its pictures, by index.
    """

    def __init__(self, source: PictureSource, chosen: Sequence[int] | np.ndarray) -> None:
        self.title = source.title
        self.source = source
        self.chosen = np.asarray(chosen, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes:
        """The encoded picture."""
        return self.source.read(int(self.chosen[index]))

    def name(self, index: int) -> str:
        """Its name in the whole."""
        return self.source.name(int(self.chosen[index]))

    def fingerprint(self) -> str:
        """Of the whole and of the choice."""
        return digest([self.source.fingerprint(), self.chosen.tobytes()])


def hold_out(source: PictureSource, count: int, seed: int = 0) -> tuple[SubsetSource, SubsetSource]:
    """Sets pictures aside that training never sees.

    Args:
        source: the whole; streamed shards cannot be split, name separate shards there.
        count: how many to set aside.
        seed: of the choice.

    Returns:
        (rest, held out).

    Raises:
        ValueError: the source is no larger than `count`.
    """
    if not 0 < count < len(source):
        raise ValueError(
            f"{source.title} has {len(source)} pictures: cannot hold out {count} and have some left to train"
        )
    order = np.random.default_rng([seed, 0x0DE4]).permutation(len(source))
    return SubsetSource(source, np.sort(order[count:])), SubsetSource(source, np.sort(order[:count]))


def digest(parts: Iterable[str | bytes]) -> str:
    """Short hash of a sequence of strings."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
        state.update(b"\0")
    return state.hexdigest()[:16]
