"""Where records and pictures lie: a chat file beside a folder, or webdataset tars read in place."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Protocol

from PIL import Image, UnidentifiedImageError

from sparse_vlm.strict_tar import StrictTarInfo
from sparse_vlm.transform import UNREADABLE, to_rgb

from .chat_file import ChatFile
from .records import BadRecordError, Record, describe, parse_record

_PICTURES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")


class Source(Protocol):
    """Records with their pictures, by index."""

    def __len__(self) -> int:
        """How many records, good and bad."""

    def read(self, index: int) -> Record:
        """Parse one record, and make sure that its pictures exist; BadRecordError otherwise."""

    def open_picture(self, index: int, name: str) -> Image.Image:
        """Decode one picture of a record; BadRecordError if it is missing or broken."""


class FolderSource:
    """A chat file whose pictures lie in a folder.

    Args:
        chat_file: LLaVA's chat JSON.
        pictures: the folder that picture paths start from; by default the chat file's.
    """

    def __init__(self, chat_file: Path, pictures: Path | None = None) -> None:
        self.chat_file = chat_file
        self.pictures = pictures or chat_file.parent
        if not self.pictures.is_dir():
            raise ValueError(f"there is no picture folder {self.pictures}")
        self.records = ChatFile(chat_file)

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Record:
        """See :class:`Source`."""
        try:
            raw = self.records[index]
        except UnicodeDecodeError as error:
            where = describe(None, index, self.chat_file)
            raise BadRecordError(f"{where} is not written in UTF-8 ({error})") from error
        record = parse_record(raw, describe(raw, index, self.chat_file))
        for name in record.pictures:
            if not (self.pictures / name).is_file():
                raise BadRecordError(f"{record.where}: its picture {self.pictures / name} is missing")
        return record

    def open_picture(self, index: int, name: str) -> Image.Image:
        """See :class:`Source`."""
        path = self.pictures / name
        try:
            return decode(path.read_bytes())
        except UNREADABLE as error:
            where = describe(self.records[index], index, self.chat_file)
            raise BadRecordError(f"{where}: its picture {path} is broken ({error})") from error


@dataclass(frozen=True)
class _Member:
    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class TarSource:
    """Webdataset tars: each sample is a ``.json`` record and its pictures under the same key.

    The tars are indexed once by their headers and read in place, never unpacked. A record that names its
    picture finds it by that name; one that does not gets the pictures of its sample, in order of their names.

    Args:
        patterns: tar files, not compressed, or glob patterns of them.

    Raises:
        ValueError: if nothing matches, or a file is no plain tar.
    """

    def __init__(self, patterns: Sequence[str | Path]) -> None:
        self.samples: list[tuple[Path, str, _Member, dict[str, _Member]]] = []
        for pattern in patterns:
            paths = sorted(glob(str(pattern)))  # noqa: PTH207 - absolute patterns
            if not paths:
                raise ValueError(f"no tar matches {pattern}")
            for path in paths:
                self._index(Path(path))

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Record:
        """See :class:`Source`."""
        path, key, text, members = self.samples[index]
        where = f"record {key!r} of {path}"
        try:
            raw = json.loads(text.read())
        except ValueError as error:
            raise BadRecordError(f"{where} is not valid JSON: {error}") from error
        raw = {"conversations": raw} if isinstance(raw, list) else raw
        if isinstance(raw, dict) and "image" not in raw and "images" not in raw and members:
            raw = {**raw, "image": list(members)}
        record = parse_record(raw, where)
        for name in record.pictures:
            if self._find(index, name, alone=len(record.pictures) == 1) is None:
                raise BadRecordError(f"{where}: its picture {name} is missing from the tar")
        return record

    def open_picture(self, index: int, name: str) -> Image.Image:
        """See :class:`Source`."""
        path, key, _, _ = self.samples[index]
        member = self._find(index, name)
        if member is None:
            raise BadRecordError(f"record {key!r} of {path}: its picture {name} is missing from the tar")
        try:
            return decode(member.read())
        except UNREADABLE as error:
            raise BadRecordError(
                f"record {key!r} of {path}: its picture {name} is broken ({error})"
            ) from error

    def _find(self, index: int, name: str, alone: bool = True) -> _Member | None:
        members = self.samples[index][3]
        if name in members:
            return members[name]
        named = [member for key, member in members.items() if Path(key).name == Path(name).name]
        if named:
            return named[0]
        # A sample with one picture has it under its own key, whatever the record calls it.
        return next(iter(members.values())) if alone and len(members) == 1 else None

    def _index(self, path: Path) -> None:
        texts: dict[str, _Member] = {}
        pictures: dict[str, dict[str, _Member]] = {}
        try:
            # "r:": a compressed one cannot be read in place.
            with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as tar:
                for entry in tar:
                    folder, _, base = entry.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    member = _Member(path, entry.offset_data, entry.size)
                    if not entry.isfile():
                        continue
                    if extension.lower() == "json":
                        texts[key] = member
                    elif extension.lower().rpartition(".")[2] in _PICTURES:
                        pictures.setdefault(key, {})[entry.name] = member
        except tarfile.TarError as error:
            raise ValueError(
                f"{path} is no whole tar file ({error}); a compressed one has to be decompressed first"
            ) from error
        for key, text in texts.items():
            self.samples.append((path, key, text, dict(sorted(pictures.get(key, {}).items()))))


def decode(data: bytes) -> Image.Image:
    """Decode a picture completely, so that a broken file shows here and nowhere later.

    Raises:
        any of ``UNREADABLE``: if that fails.
    """
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"{len(data)} bytes in none of the formats that Pillow reads") from error
    picture.load()
    return to_rgb(picture)


class JoinedSource:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.starts = [0]
        for source in self.sources:
            self.starts.append(self.starts[-1] + len(source))

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int) -> Record:
        """See :class:`Source`."""
        source, inner = self._locate(index)
        return source.read(inner)

    def open_picture(self, index: int, name: str) -> Image.Image:
        """See :class:`Source`."""
        source, inner = self._locate(index)
        return source.open_picture(inner, name)

    def _locate(self, index: int) -> tuple[Source, int]:
        for number, source in enumerate(self.sources):
            if index < self.starts[number + 1]:
                return source, index - self.starts[number]
        raise IndexError(f"record {index} of {len(self)}")
