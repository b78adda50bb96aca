"""From the place that the settings name to a source of pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bootstrap.data.concat import ConcatSource
from bootstrap.data.config import DataConfig
from bootstrap.data.decode import EXTENSIONS
from bootstrap.data.folder import FolderSource, walk_pictures
from bootstrap.data.source import AnySource, PictureSource
from bootstrap.data.tars import is_tar_name, open_tars


def open_source(config: DataConfig) -> AnySource:
    """Opens the source that the settings name.

    Returns:
        A `PictureSource`; a `ShardSource` for remote or compressed tars.

    Raises:
        FileNotFoundError: there is nothing at that place.
        ValueError: there are no pictures in it, or `data.split` or `data.column` is given and it is no
            Hugging Face dataset.
    """
    places = config.source if isinstance(config.source, tuple) else (config.source,)
    kinds = [config.kind if config.kind != "auto" else guess_kind(place) for place in places]
    for option in ("split", "column"):
        if getattr(config, option) is not None and "hf" not in kinds:
            raise ValueError(
                f"data.{option} is for Hugging Face datasets, and {config.source!r} is none: leave it out"
            )
    if isinstance(config.source, tuple):
        return _open_several(config, config.source, kinds)
    if kinds[0] == "folder":
        return FolderSource(config.source)
    if kinds[0] == "tars":
        return open_tars(config.source)
    from bootstrap.data.hf import HfSource

    return HfSource(config.source, split=config.split, column=config.column)


def _open_several(config: DataConfig, places: tuple[str, ...], kinds: Sequence[str]) -> AnySource:
    sources = []
    for place, kind in zip(places, kinds, strict=True):
        options = (config.split, config.column) if kind == "hf" else (None, None)
        one = dataclasses.replace(config, source=place, split=options[0], column=options[1])
        sources.append(open_source(one))
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
        ValueError: it is none of the three, or two of them.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
            return "hf"
        suffixes = {Path(name).suffix.lower() for name in names}
        if any(map(is_tar_name, names)):
            if suffixes & set(EXTENSIONS):
                raise ValueError(
                    f"data.source {source!r} holds both pictures and tars: say which are meant with "
                    "data.kind=folder or data.kind=tars"
                )
            return "tars"
        if not suffixes & {".parquet", ".arrow"}:
            return "folder"
        if next(walk_pictures(path), None) is not None:  # img2dataset writes a table beside its pictures
            raise ValueError(
                f"data.source {source!r} holds both pictures and tables: say which are meant with "
                "data.kind=folder or data.kind=hf"
            )
        return "hf"
    if path.is_file() and path.suffix.lower() in (".parquet", ".arrow"):
        return "hf"
    if "://" in source or source.startswith("pipe:") or ".tar" in source.lower() or ".tgz" in source.lower():
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
