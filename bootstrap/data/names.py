"""Millions of names in two arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class PackedNames(Sequence[str]):
    """Names of pictures, kept as their bytes end to end.

    A list holds each name as an object, some hundred bytes of it for a name of twenty, and a forked worker
    copies all their pages by merely reading them, because Python counts references inside the objects.

    Args:
        names: a NUL in one, which no file name holds but a tar can, becomes U+FFFD.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._hold(
            "".join(name.replace("\0", "�") + "\0" for name in names).encode("utf-8", "surrogateescape")
        )

    @classmethod
    def split(cls, joined: bytes) -> PackedNames:
        """The names that :meth:`joined` made one string of."""
        packed = cls.__new__(cls)
        packed._hold(joined)
        return packed

    def _hold(self, joined: bytes) -> None:
        self._joined = joined
        self._ends = np.flatnonzero(np.frombuffer(joined, dtype=np.uint8) == 0)

    def joined(self) -> bytes:
        """All names, each with a NUL behind it."""
        return self._joined

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """A name; IndexError where there is none."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self._ends[place - 1]) + 1 if place else 0
        return self._joined[start : int(self._ends[place])].decode("utf-8", "surrogateescape")
