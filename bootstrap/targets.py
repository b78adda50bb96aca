"""Teacher targets: asked anew for every batch, or asked once and kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_vlm.atomic import explain_full_disk, write_atomic

from .data import PictureBatch
from .student import Spreads, Targets
from .teacher import Teacher

_CHECKED_ROWS = 4
_TOLERANCE = 0.02
# A spread of this share of the values is that of the arithmetic.
_ROUNDING = 1e-5
# What a store depends on and knows by a hash.
_HASHED = {
    "source": "other pictures (by name and size) than data.source has now",
    "teacher_sha256": "a teacher with other weights than teacher.name has now",
}


class TargetSource(Protocol):
    """Where the targets of a batch come from."""

    def __call__(self, batch: PictureBatch, images: Tensor, warming_up: bool) -> Targets:
        """The targets of a batch, on the device of ``images``."""


class LiveTargets:
    """The teacher looks at every batch.

    Args:
        teacher: the teacher.
        block: the block whose input the student's hand-over is to match.
    """

    def __init__(self, teacher: Teacher, block: int) -> None:
        self.teacher = teacher
        self.block = block

    def __call__(self, batch: PictureBatch, images: Tensor, warming_up: bool) -> Targets:
        """Ask the teacher; during the warm-up only as far as it is needed."""
        seen = self.teacher(images, at_block=self.block, stop=warming_up)
        return Targets(seen.mid, seen.tokens, seen.pooled)


class StoredTargets:
    """Each picture and view passes the teacher once; fp16 arrays on disk remember what it said.

    Rows are filled when they are first needed and marked afterwards, so a run that is killed leaves a store
    that the next run goes on with. A store made for another teacher, data or view is refused, and its first
    rows are checked against the live teacher.

    Args:
        live: the teacher.
        folder: where to keep the arrays.
        pictures: pictures in the source.
        views: views per picture.
        made_for: JSON values that say what the targets depend on.
        max_gigabytes: the most the arrays may take.
        looks: pictures that the run still looks at, each time it does; None for no end.
    """

    _KINDS = ("mid", "tokens", "pooled")

    def __init__(
        self,
        live: LiveTargets,
        folder: str | Path,
        pictures: int,
        views: int,
        made_for: dict[str, Any],
        max_gigabytes: float,
        looks: int | None = None,
    ) -> None:
        self.live = live
        self.views = views
        self.folder = Path(folder)
        spec = live.teacher.spec
        rows, patches = pictures * views, spec.grid[0] * spec.grid[1]
        shapes = {
            "mid": (rows, patches, spec.width),
            "tokens": (rows, patches, spec.width),
            "pooled": (rows, spec.embedding_width),
        }
        needed = sum(2 * int(np.prod(shape)) for shape in shapes.values()) / 1e9
        if needed > max_gigabytes:
            raise ValueError(
                f"targets.store would grow to {needed:.1f} GB for {pictures} pictures x {views} views, more "
                f"than targets.max_gigabytes={max_gigabytes}: use fewer views, raise the limit, or leave the "
                "store out"
            )
        self._claim({**made_for, "pictures": pictures, "views": views, "block": live.block})
        self.arrays = {
            name: _Rows(self._make(f"{name}.f16", np.float16, shape), np.float16, shape)
            for name, shape in shapes.items()
        }
        # Two marks a row, since the warm-up asks for the mid-depth tokens only.
        self.done = {
            name: _Rows(self._make(f"{name}.done", np.uint8, (rows,)), np.uint8, (rows,))
            for name in ("mid", "final")
        }
        self._check_room(rows if looks is None else min(rows, looks))
        self.checked: set[str] = set()

    def __call__(self, batch: PictureBatch, images: Tensor, warming_up: bool) -> Targets:
        """The stored targets of a batch; what is missing is asked for and stored first."""
        rows = (batch.indices * self.views + batch.views % self.views).numpy()
        known = self.done["mid"].read[rows].astype(bool)
        if not warming_up:
            known &= self.done["final"].read[rows].astype(bool)
        names = ("mid",) if warming_up else self._KINDS
        if known.any() and not self.checked.issuperset(names):
            self._check(batch, images, rows, known, names)
        if not known.all():
            self._fill(batch, images, rows, ~known, warming_up)
        read = [_send(self.arrays[name].read, rows, images.device) for name in names]
        return Targets(read[0], None, None) if warming_up else Targets(*read)

    def _fill(
        self, batch: PictureBatch, images: Tensor, rows: np.ndarray, missing: np.ndarray, warming_up: bool
    ) -> None:
        asked = self.live(batch, images[torch.from_numpy(missing)], warming_up)
        for name, values in zip(self._KINDS, asked, strict=True):
            if values is not None:
                self.arrays[name].write(rows[missing], values.half().cpu().numpy())
        marks = np.ones(int(missing.sum()), dtype=np.uint8)
        self.done["mid"].write(rows[missing], marks)
        if not warming_up:
            self.done["final"].write(rows[missing], marks)

    def _check(
        self,
        batch: PictureBatch,
        images: Tensor,
        rows: np.ndarray,
        known: np.ndarray,
        names: tuple[str, ...],
    ) -> None:
        """Compare the first stored rows of each kind that is about to be read with the live teacher."""
        places = np.flatnonzero(known)[:_CHECKED_ROWS]
        asked = self.live(batch, images[torch.from_numpy(places)], warming_up=names == ("mid",))
        for name in names:
            stored = torch.from_numpy(self.arrays[name].read[rows[places]]).float()
            wanted = getattr(asked, name).float().cpu()
            error = float((stored - wanted).norm() / wanted.norm())
            if not error < _TOLERANCE:
                raise ValueError(
                    f"the targets in {self.folder} are not what the teacher says now ({name}: relative "
                    f"difference {error:.3f}): delete the folder or name another targets.store"
                )
        self.checked.update(names)

    def _claim(self, made_for: dict[str, Any]) -> None:
        path = self.folder / "store.json"
        if path.is_file():
            try:
                found = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}): delete {self.folder}, or name another targets.store"
                ) from None
            for key, value in made_for.items():
                if found.get(key) != value:
                    # Hashes say nothing to people.
                    other = f"{key}={found.get(key)!r}, this run has {value!r}"
                    raise ValueError(
                        f"the targets in {self.folder} were made for {_HASHED.get(key, other)}: name another "
                        "folder with targets.store=…, or keep none with targets.store=null"
                    )
        else:
            write_atomic(path, json.dumps(made_for, indent=2))

    def _make(self, name: str, dtype: type, shape: tuple[int, ...]) -> Path:
        """The file of an array, made if it is not there."""
        path = self.folder / name
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.exists():
            # A sparse file: rows that are never asked for take no room. It appears with its full size, and
            # where several processes make it, one of them wins.
            part = path.with_name(f"{name}.{uuid.uuid4().hex}.part")  # containers number processes alike
            with explain_full_disk(path), part.open("wb") as file:
                if dtype is np.uint8:
                    file.write(bytes(size))  # marks are read before they are written: they need their room
                file.truncate(size)
            with suppress(FileExistsError):
                os.link(part, path)
            part.unlink()
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {size}: delete {self.folder}")
        return path

    def _check_room(self, rows: int) -> None:
        """See that the disk has room for what is still to be stored.

        Raises:
            ValueError: if it has not.
        """
        row = sum(array.row_bytes for array in self.arrays.values())
        missing = min(rows * row, sum(array.count_missing_bytes() for array in self.arrays.values()))
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise ValueError(
                f"targets.store={self.folder} still needs {missing / 1e9:.3g} GB, and its disk has "
                f"{free / 1e9:.3g} GB free: make room, use fewer views, name another folder, or leave the "
                "store out"
            )


class _Rows:
    """An array on disk, read through a memory map and written by system calls.

    A write through the map would end the process (SIGBUS) where the disk has no room for the page.

    Args:
        path: the file, of its full size.
        dtype: of its elements.
        shape: rows first.
    """

    def __init__(self, path: Path, dtype: type, shape: tuple[int, ...]) -> None:
        self.path = path
        self.read = np.memmap(path, dtype=dtype, mode="r+", shape=shape)
        self.row_bytes = int(np.prod(shape[1:])) * self.read.itemsize
        self._file = os.open(path, os.O_RDWR)
        weakref.finalize(self, os.close, self._file)

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write some rows.

        Raises:
            OSError: if the disk is full, with one sentence.
        """
        with explain_full_disk(self.path):
            for row, value in zip(rows.tolist(), np.ascontiguousarray(values), strict=True):
                _write_at(self._file, value.tobytes(), row * self.row_bytes)

    def count_missing_bytes(self) -> int:
        """Bytes that the file takes no room for yet."""
        status = self.path.stat()
        return max(0, status.st_size - 512 * getattr(status, "st_blocks", 0))


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _send(array: np.memmap, rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows of an array, on a device."""
    if device.type != "cuda":
        return torch.from_numpy(array[rows]).to(device)
    # Through pinned memory, which the copy reads while Python goes on, and whose allocator waits for it.
    staged = torch.empty((len(rows), *array.shape[1:]), dtype=torch.float16, pin_memory=True)
    torch.index_select(torch.from_numpy(array), 0, torch.from_numpy(rows), out=staged)
    return staged.to(device, non_blocking=True)


@torch.no_grad()
def measure_spreads(teacher: Teacher, block: int, batches: list[Tensor]) -> tuple[Spreads, Tensor | None]:
    """Standard deviation of the teacher's targets per channel, and its mean class token entering ``block``.

    Args:
        teacher: the teacher.
        block: the student's first block.
        batches: pictures, (B, 3, H, W) each.

    Returns:
        The spreads (never zero), and (D,) or None for a teacher without class token.

    Raises:
        ValueError: if the teacher says the same about all pictures, or no numbers.
    """
    seen = [teacher(images, at_block=block) for images in batches]
    if any(output.tokens is None or output.pooled is None or output.mid is None for output in seen):
        raise ValueError("the teacher returned no targets")
    spreads = []
    for name, width in (
        ("mid", teacher.spec.width),
        ("tokens", teacher.spec.width),
        ("pooled", teacher.spec.embedding_width),
    ):
        values = torch.cat([getattr(output, name).float().reshape(-1, width) for output in seen])
        spread, size = values.std(dim=0), float(values.abs().mean())
        if not math.isfinite(size):
            raise ValueError(f"teacher {teacher.spec.name} says no numbers ({name}): its weights are damaged")
        if float(spread.mean()) <= _ROUNDING * size:
            raise ValueError(
                f"teacher {teacher.spec.name} says the same about all of the first {sum(map(len, batches))} "
                f"pictures ({name}), so that distances from it have no unit: is data.source one picture?"
            )
        spreads.append(spread)
    # A channel that never moves must not divide by zero; a hundredth of the usual spread keeps it small.
    spreads = [spread.clamp(min=1e-2 * float(spread.mean())) for spread in spreads]
    states = [output.mid_cls for output in seen if output.mid_cls is not None]
    return Spreads(*spreads), torch.cat(states).float().mean(dim=0) if states else None
