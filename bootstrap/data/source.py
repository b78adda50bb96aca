"""What a source of pictures is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable


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


def digest(parts: Iterable[str | bytes]) -> str:
    """Short hash of a sequence of strings."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
        state.update(b"\0")
    return state.hexdigest()[:16]
