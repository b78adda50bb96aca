"""From the place that the settings name to a source of pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bootstrap.data.concat import ConcatSource
from bootstrap.data.config import DataConfig
from bootstrap.data.folder import FolderSource
from bootstrap.data.source import AnySource, PictureSource
from bootstrap.data.tars import open_tars


def open_source(config: DataConfig) -> AnySource:
    """Opens the source that the settings name.

    Returns:
        A `PictureSource`; a `ShardSource` for remote or compressed tars.

    Raises:
        FileNotFoundError: there is nothing at that place.
        ValueError: there are no pictures in it.
    """
    if isinstance(config.source, tuple):
        return _open_several(config, config.source)
    kind = config.kind if config.kind != "auto" else guess_kind(config.source)
    if kind == "folder":
        return FolderSource(config.source)
    if kind == "tars":
        return open_tars(config.source)
    from bootstrap.data.hf import HfSource

    return HfSource(config.source, split=config.split, column=config.column)


def _open_several(config: DataConfig, places: tuple[str, ...]) -> AnySource:
    sources = [open_source(dataclasses.replace(config, source=place)) for place in places]
    streamed = [source.title for source in sources if not isinstance(source, PictureSource)]
    if streamed:
        raise ValueError(
            f"data.source names several places, and {streamed[0]} can only be read as a stream: several "
            "sources need random access"
        )
    return ConcatSource([source for source in sources if isinstance(source, PictureSource)])


def guess_kind(source: str) -> str:
    """Looks at a place and says "folder", "tars" or "hf".

    Raises:
        FileNotFoundError: there is nothing at that place.
        ValueError: it is none of the three.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
            return "hf"
        suffixes = {Path(name).suffix.lower() for name in names}
        if ".tar" in suffixes:
            return "tars"
        return "hf" if suffixes & {".parquet", ".arrow"} else "folder"
    if path.is_file() and path.suffix.lower() in (".parquet", ".arrow"):
        return "hf"
    if "://" in source or source.startswith("pipe:") or ".tar" in source or ".tgz" in source:
        return "tars"
    if path.exists():
        raise ValueError(
            f"data.source {source!r} is a file, but neither a .tar nor a .parquet or .arrow file; "
            "to use a folder of pictures, name the folder"
        )
    raise FileNotFoundError(
        f"data.source {source!r} does not exist; give a folder of pictures, webdataset tars or a "
        "Hugging Face dataset on disk"
    )
