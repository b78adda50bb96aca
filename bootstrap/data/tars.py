"""Webdataset tar shards: local ones with random access, remote and compressed ones as streams.

A picture is the first member with a picture's extension among those that share a webdataset key (the path up
to the first dot of the file name), so `a.jpg` counts and `a.seg.png` beside it does not.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import logging
import os
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np
from tqdm import tqdm

from bootstrap.data.decode import EXTENSIONS, BadPictureError
from bootstrap.data.names import PackedNames
from bootstrap.data.shards import StreamedShards, picture_key
from bootstrap.data.source import digest
from sparse_vlm.atomic import write_atomic
from sparse_vlm.strict_tar import StrictTarInfo

_log = logging.getLogger(__name__)

_INDEX_VERSION = "5"
_MOST_OPEN_FILES = 64
# Before the bar of a listing appears.
_QUIET_SECONDS = 5.0
_TAR_NAMES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def expand_shards(source: str) -> list[str]:
    """Lists the shards that a source string names.

    Args:
        source: a folder, path, glob, URL or "pipe:" command, with `{000..123}` braces; "::" joins several.

    Raises:
        FileNotFoundError: a local path, glob or folder names no shard.
    """
    shards: list[str] = []
    for part in source.split("::"):
        for item in braceexpand.braceexpand(part):
            if _is_remote(item):
                shards.append(item)
                continue
            item = str(Path(item).expanduser())
            if Path(item).is_dir():
                found = sorted(str(path) for path in Path(item).iterdir() if is_tar_name(path.name))
            else:
                found = [item] if Path(item).is_file() else sorted(glob.glob(item))  # noqa: PTH207
            if not found:
                raise FileNotFoundError(f"no tar shards at {item!r} (from data.source {source!r})")
            shards.extend(found)
    return shards


def open_tars(source: str) -> TarSource | StreamedShards:
    """Opens shards: with random access if all are local and uncompressed, else as streams.

    Raises:
        FileNotFoundError: no shards there.
        ValueError: no pictures in them.
    """
    shards = expand_shards(source)
    if any(_is_remote(shard) or not _is_plain(shard) for shard in shards):
        return StreamedShards(shards, title=source)
    return TarSource(shards, title=source)


class TarSource:
    """Pictures in local, uncompressed tars.

    Each tar is listed once; the list is kept in the user's cache folder and renewed when the tar changes.

    Args:
        shards: the tars' paths.
        title: what to call them in messages.

    Raises:
        ValueError: no picture in any of them.
    """

    def __init__(self, shards: list[str], title: str) -> None:
        self.title = title
        self.shards = shards
        indices = _list_tars(shards)
        for shard, index in zip(shards, indices, strict=True):
            if index.damage:
                found = len(index.names)
                _log.warning("tar %s is damaged after %d pictures: %s", shard, found, index.damage)
        _warn_of_left_out(title, indices)
        self._starts = np.cumsum([0] + [len(index.offsets) for index in indices])
        self._indices = indices
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
        self._fingerprint: str | None = None
        if len(self) == 0:
            raise ValueError(
                f"no pictures in the {len(shards)} tar(s) of {title!r}: looked for members named "
                f"{' '.join(EXTENSIONS)}"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        shard, member = self._locate(index)
        listed = self._indices[shard]
        size = int(listed.sizes[member])
        try:
            data = os.pread(self._open(shard), size, int(listed.offsets[member]))
        except OSError as error:
            raise BadPictureError("unreadable", error.strerror or str(error)) from error
        if len(data) < size:
            raise BadPictureError("truncated", f"the tar ends {size - len(data)} bytes early")
        return data

    def name(self, index: int) -> str:
        """Tar and member."""
        shard, member = self._locate(index)
        return f"{Path(self.shards[shard]).name}/{self._indices[shard].names[member]}"

    def files(self) -> list[Path]:
        """The tars."""
        return [Path(shard) for shard in self.shards]

    def fingerprint(self) -> str:
        """Of the names and sizes of all members."""
        if self._fingerprint is None:  # every checkpoint asks, and of millions it takes its time
            self._fingerprint = digest(
                f"{name} {size}"
                for listed in self._indices
                for name, size in zip(listed.names, listed.sizes, strict=True)
            )
        return self._fingerprint

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)} in {self.title}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def _open(self, shard: int) -> int:
        if self._owner != os.getpid():  # a forked worker opens its own, so that it closes only its own
            self._files, self._owner = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= _MOST_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_owner": -1}

    def __del__(self) -> None:
        if getattr(self, "_owner", -1) == os.getpid():
            for descriptor in self._files.values():
                with contextlib.suppress(OSError):
                    os.close(descriptor)


class TarIndex(NamedTuple):
    """Where the pictures of one tar lie.

    Attributes:
        names: of the members.
        offsets: of their bytes in the tar.
        sizes: of their bytes.
        damage: what keeps the rest of the tar from being read; empty where nothing does.
        cut: pictures left out because their names are another's up to the first dot.
        links: names of pictures that are links, which hold none.
    """

    names: PackedNames
    offsets: np.ndarray
    sizes: np.ndarray
    damage: str = ""
    cut: int = 0
    links: int = 0


def _warn_of_left_out(title: str, indices: Sequence[TarIndex]) -> None:
    found = sum(len(index.names) for index in indices)
    cut, links = sum(index.cut for index in indices), sum(index.links for index in indices)
    if cut:
        _log.warning(
            "%s: %d pictures, and %d more left out whose names are the same up to the first dot, which in "
            "webdataset tars makes them one sample: name them img_0001.jpg and not img.0001.jpg",
            title,
            found,
            cut,
        )
    if links:
        _log.warning("%s: %d links to pictures are left out: write the tar without links", title, links)


def _list_tars(shards: Sequence[str]) -> list[TarIndex]:
    """The lists of all tars, with a bar where that takes its time.

    Each process of a run begins at another tar, so that together they list each one once and find the others'
    lists remembered.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    first = len(shards) * rank // processes
    found: dict[int, TarIndex] = {}
    with tqdm(
        total=len(shards),
        unit="tar",
        desc="listing tars",
        leave=False,
        delay=_QUIET_SECONDS,
        mininterval=1 if sys.stderr.isatty() else 30,
        disable=rank != 0,
    ) as bar:
        for place in (*range(first, len(shards)), *range(first)):
            found[place] = _load_or_build_index(shards[place])
            bar.update()
    return [found[place] for place in range(len(shards))]


def build_index(shard: str) -> TarIndex:
    """Reads the headers of a tar; a damaged tar is listed up to the damage."""
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    last_key: str | None = None
    damage = ""
    cut = links = 0
    try:
        with tarfile.open(shard, mode="r:", tarinfo=StrictTarInfo) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or a large tar keeps every header
                key = picture_key(member.name)
                if key is not None and (member.issym() or member.islnk()):
                    links += 1
                if key is None or not member.isreg() or member.issparse():
                    continue
                if key == last_key:
                    cut += _is_numbered_alike(member.name, names[-1])
                    continue
                last_key = key
                names.append(member.name)
                offsets.append(member.offset_data)
                sizes.append(member.size)
    except (tarfile.TarError, EOFError) as error:
        damage = str(error)
    places = np.asarray(offsets, dtype=np.int64), np.asarray(sizes, dtype=np.int64)
    return TarIndex(PackedNames(names), *places, damage, cut, links)


def _is_numbered_alike(name: str, kept: str) -> bool:
    """Whether two pictures of one key are a.1.jpg and a.2.jpg, and not a.jpg and its a.seg.png."""
    return Path(kept).name.count(".") > 1 and Path(kept).suffix == Path(name).suffix


def index_folder() -> Path:
    """Where the lists of tars are remembered."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "sparse_vlm" / "tars"


def _load_or_build_index(shard: str) -> TarIndex:
    path = Path(shard).resolve()
    status = path.stat()
    stamp = f"{_INDEX_VERSION} {status.st_size} {status.st_mtime_ns}"
    remembered = index_folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.npz"
    try:
        with np.load(remembered, allow_pickle=False) as arrays:
            if bytes(arrays["stamp"]).decode() == stamp:
                names = PackedNames.split(bytes(arrays["names"]))
                damage = bytes(arrays["damage"]).decode("utf-8", "surrogateescape")
                cut, links = (int(count) for count in arrays["left_out"])
                return TarIndex(names, arrays["offsets"], arrays["sizes"], damage, cut, links)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or damaged: it is built anew
    index = build_index(shard)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        stamp=np.frombuffer(stamp.encode(), dtype=np.uint8),
        names=np.frombuffer(index.names.joined(), dtype=np.uint8),
        offsets=index.offsets,
        sizes=index.sizes,
        damage=np.frombuffer(index.damage.encode("utf-8", "surrogateescape"), dtype=np.uint8),
        left_out=np.asarray([index.cut, index.links]),
    )
    with contextlib.suppress(OSError):  # a read-only home only costs the listing next time
        write_atomic(remembered, buffer.getvalue())
    return index


def _is_remote(shard: str) -> bool:
    return "://" in shard or shard.startswith("pipe:")


def is_tar_name(name: str) -> bool:
    """Whether a file in a folder is a shard, compressed or not."""
    return not name.startswith(".") and name.lower().endswith(_TAR_NAMES)


def _is_plain(shard: str) -> bool:
    return not shard.lower().endswith((".gz", ".tgz", ".bz2", ".xz", ".zst"))
