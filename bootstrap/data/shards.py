"""Remote and compressed tar shards, read from the front.

http(s) goes through urllib; "pipe:" commands (such as `pipe:aws s3 cp s3://... -`) and every other scheme go
through the webdataset library, which knows them.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import tarfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from bootstrap.data.decode import EXTENSIONS
from bootstrap.data.source import digest
from sparse_vlm.strict_tar import StrictTarInfo

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
_TIMEOUT_SECONDS = 60


class StreamedPicture(NamedTuple):
    """One picture read off a shard."""

    member: int
    name: str
    data: bytes


class StreamedShards:
    """Pictures in tars that can only be read from the front.

    Args:
        shards: URLs, "pipe:" commands or paths of compressed tars.
        title: what to call them in messages.
        pause_seconds: how long to wait before a broken connection is tried again; doubles each time.
    """

    def __init__(self, shards: Sequence[str], title: str, pause_seconds: float = 1.0) -> None:
        self.shards: Sequence[str] = list(shards)
        self.title = title
        self.pause_seconds = pause_seconds

    def stream(self, shard: int, start: int = 0) -> Iterator[StreamedPicture]:
        """Pictures of one shard from number `start` on; a broken connection is taken up where it broke.

        A shard that stays broken ends early, with a warning that names it.
        """
        failures = 0
        while True:
            try:
                for picture in _read_tar(self.shards[shard], start):
                    start = picture.member + 1
                    failures = 0
                    yield picture
                return
            except (OSError, EOFError, tarfile.TarError, ValueError, http.client.HTTPException) as error:
                failures += 1
                if failures >= _ATTEMPTS:
                    _log.warning(
                        "shard %s given up after %d pictures and %d attempts: %s",
                        self.shards[shard],
                        start,
                        failures,
                        error,
                    )
                    return
                time.sleep(self.pause_seconds * 2 ** (failures - 1))

    def files(self) -> list[Path]:
        """The shards that lie on this disk."""
        return [Path(shard) for shard in self.shards if Path(shard).is_file()]

    def fingerprint(self) -> str:
        """Of the shards' names."""
        return digest(self.shards)


def picture_key(name: str) -> str | None:
    """The webdataset key of a member, or None if it is no picture."""
    path = Path(name)
    if path.name.startswith(".") or not name.lower().endswith(EXTENSIONS):
        return None
    return str(path.parent / path.name.split(".", 1)[0])


def _read_tar(shard: str, start: int) -> Iterator[StreamedPicture]:
    count = 0
    last_key: str | None = None
    label = Path(shard.split()[-1] if shard.startswith("pipe:") else shard).name
    with (
        _open_stream(shard) as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as archive,
    ):
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # or every header is kept
            key = picture_key(member.name) if member.isreg() else None
            if key is None or key == last_key:
                continue
            last_key = key
            if count >= start:
                extracted = archive.extractfile(member)
                yield StreamedPicture(count, f"{label}/{member.name}", extracted.read() if extracted else b"")
            count += 1


@contextlib.contextmanager
def _open_stream(shard: str) -> Iterator[IO[bytes]]:
    if shard.startswith(("http://", "https://")):
        with urllib.request.urlopen(shard, timeout=_TIMEOUT_SECONDS) as response:
            yield cast("IO[bytes]", response)
    elif "://" in shard or shard.startswith("pipe:"):
        from webdataset import gopen

        stream: Any = gopen(shard)
        try:
            yield stream
        finally:
            with contextlib.suppress(OSError):  # a pipe whose reader leaves early ends by SIGPIPE
                stream.close()
    else:
        with Path(shard).open("rb") as file:
            yield file
