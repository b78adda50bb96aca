"""Tars that say so when they are damaged."""

from __future__ import annotations

import tarfile


class StrictTarInfo(tarfile.TarInfo):
    """A tar's header that says so when it is damaged.

    The library's own takes a header that it cannot read, or a file that stops before one, for the end of the
    archive, unless it is the first.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> StrictTarInfo:
        """Reads the next header.

        Raises:
            tarfile.ReadError: if it is damaged or missing.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the empty blocks that end a whole archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no header at byte {archive.offset}: {error}") from error
