"""A Hugging Face dataset on disk: a `save_to_disk` folder, or parquet or arrow files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bootstrap.data.decode import BadPictureError
from bootstrap.data.source import digest

_LIKELY_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")


class HfSource:
    """Pictures in a dataset on disk.

    Args:
        path: `save_to_disk` folder, a folder of parquet or arrow files, or one such file.
        split: which split, where there are several.
        column: which column holds the pictures; None looks for the only likely one.

    Raises:
        FileNotFoundError: no dataset there.
        ValueError: no such split or column, or no rows.
    """

    def __init__(self, path: str, split: str | None = None, column: str | None = None) -> None:
        import datasets

        self.title = path
        whole = _load(Path(path).expanduser(), split)
        self.column = _find_column(whole, path, column)
        feature = whole.features[self.column]
        if isinstance(feature, datasets.Image):
            whole = whole.cast_column(self.column, datasets.Image(decode=False))
        self._fingerprint: str | None = None
        self._rows: Any = whole.select_columns([self.column]).with_format(None)
        if len(self._rows) == 0:
            raise ValueError(f"the dataset at {path!r} has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> bytes:
        """The encoded picture, from the row itself or from the file it names."""
        try:
            cell = self._rows[index][self.column]
            if isinstance(cell, dict):
                held = cell.get("bytes")
                cell = held if held is not None else cell.get("path")
            if isinstance(cell, str):
                return Path(cell).read_bytes()
        except OSError as error:
            raise BadPictureError("unreadable", error.strerror or str(error)) from error
        if not isinstance(cell, (bytes, bytearray)):
            raise BadPictureError(
                "unreadable", f"the row holds {type(cell).__name__}, not an encoded picture"
            )
        return bytes(cell)

    def name(self, index: int) -> str:
        """Row number, and the picture's path where the row has one."""
        cell = self._rows[index][self.column]
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"row {index} ({path})" if path else f"row {index}"

    def files(self) -> list[Path]:
        """The tables that the rows are read from (of parquet: their copies in the cache of datasets)."""
        return [Path(entry["filename"]) for entry in self._rows.cache_files]

    def fingerprint(self) -> str:
        """Of the column, all rows' sizes, and some rows' names and contents: most rows have no names."""
        if self._fingerprint is None:  # every checkpoint asks
            rows = range(0, len(self), max(len(self) // 16, 1))
            some = (f"{self.name(row)} {self._content(row)}" for row in rows)
            self._fingerprint = digest([str(len(self)), self.column, *some, *self._sizes()])
        return self._fingerprint

    def _sizes(self) -> Iterator[bytes]:
        """Bytes of every picture that lies in its row, as the table's offsets tell them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        for chunk in self._rows.data.column(self.column).chunks:
            cells = pc.struct_field(chunk, "bytes") if pa.types.is_struct(chunk.type) else chunk
            if pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type):
                lengths = pc.fill_null(pc.binary_length(cells), -1).cast(pa.int64())
                yield lengths.to_numpy(zero_copy_only=False).tobytes()

    def _content(self, index: int) -> str:
        try:
            return hashlib.sha256(self.read(index)).hexdigest()
        except BadPictureError as error:
            return error.reason


def _load(path: Path, split: str | None) -> Any:
    import datasets

    if not path.exists():
        raise FileNotFoundError(f"the dataset {str(path)!r} does not exist")
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, dict):
            if split is not None:
                raise ValueError(f"the dataset at {str(path)!r} has no splits, but data.split is {split!r}")
            return loaded
        if split is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if split not in loaded:
            raise ValueError(
                f"data.split must be one of {', '.join(sorted(loaded))} for the dataset at {str(path)!r}, "
                f"got {split!r}"
            )
        return loaded[split]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_table(file))
    splits = {_split_of(file) for file in files} - {None}
    if split is None and len(splits) > 1:
        listed = ", ".join(sorted(map(str, splits)))
        raise ValueError(f"the files in {str(path)!r} belong to the splits {listed}: set data.split")
    if split is not None:
        files = [file for file in files if _split_of(file) == split]
    if not files:
        wanted = f" of split {split!r}" if split is not None else ""
        raise FileNotFoundError(f"no .parquet or .arrow files{wanted} in {str(path)!r}")
    if all(file.suffix == ".arrow" for file in files):
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        return datasets.concatenate_datasets(parts)
    if all(file.suffix == ".parquet" for file in files):
        return datasets.Dataset.from_parquet([str(file) for file in files])
    raise ValueError(f"{str(path)!r} mixes .parquet and .arrow files: name a folder or file with one kind")


def _is_table(file: Path) -> bool:
    """Whether a file holds rows; "cache-*.arrow" are copies that datasets keeps of what was made of them."""
    return file.suffix in (".parquet", ".arrow") and not file.name.startswith("cache-")


def _split_of(file: Path) -> str | None:
    """The split of a file by the conventions of the hub and of the cache of datasets.

    They are `train-00000-of-00002.parquet`, `train/x.parquet` and `imagenet-1k-train-00000-of-00257.arrow`.
    """
    for text in (*reversed(re.split("[^a-z]+", file.stem.lower())), file.parent.name):
        if text in ("train", "test", "validation", "valid", "val", "dev"):
            return text
    return None


def _find_column(whole: Any, path: str, column: str | None) -> str:
    import datasets

    names = list(whole.column_names)
    if column is not None:
        if column not in names:
            raise ValueError(
                f"data.column {column!r} is not in the dataset at {path!r}; columns: {', '.join(names)}"
            )
        return column
    found = [name for name in names if isinstance(whole.features[name], datasets.Image)]
    found = found or [name for name in _LIKELY_COLUMNS if name in names]
    if len(found) != 1:
        what = f"several columns of pictures ({', '.join(found)})" if found else "no column of pictures"
        raise ValueError(f"the dataset at {path!r} has {what}: set data.column to one of {', '.join(names)}")
    return found[0]
