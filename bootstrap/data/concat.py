"""Several sources of pictures as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from bootstrap.data.source import OnDisk, PictureSource, digest


class ConcatSource:
    """Sources one after the other.

    Args:
        sources: at least one, each with random access.
    """

    def __init__(self, sources: Sequence[PictureSource]) -> None:
        self.sources = tuple(sources)
        self.title = " + ".join(source.title for source in self.sources)
        self.ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, index: int) -> bytes:
        """The encoded picture."""
        source, inner = self._locate(index)
        return source.read(inner)

    def name(self, index: int) -> str:
        """Its name in its own source."""
        source, inner = self._locate(index)
        return source.name(inner)

    def files(self) -> Iterator[Path]:
        """Those of all sources that can name theirs."""
        for source in self.sources:
            if isinstance(source, OnDisk):
                yield from source.files()

    def fingerprint(self) -> str:
        """Of all sources, in their order."""
        return digest([source.fingerprint() for source in self.sources])

    def _locate(self, index: int) -> tuple[PictureSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.title} has {len(self)} pictures, no number {index}")
        place = bisect_right(self.ends, index)
        return self.sources[place], index - (self.ends[place - 1] if place else 0)
