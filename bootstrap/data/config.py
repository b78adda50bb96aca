"""Where the pictures come from and how they are shown."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the picture stream.

    Attributes:
        source: a folder of pictures; webdataset tars (path, glob, braces, URL, "pipe:" command; several
            joined with "::"); or a Hugging Face dataset on disk (`save_to_disk` folder, parquet or arrow). A
            list of such places is read as one source.
        kind: what `source` is; "auto" looks at it.
        split: which split of a Hugging Face dataset, None where it has only one.
        column: which column of a Hugging Face dataset holds the pictures, None to look for it.
        workers: processes that decode, held-out pictures too; 0 decodes in the training process.
        scale: smallest and largest share of the picture's area that a random crop covers.
        ratio: smallest and largest width / height of a random crop before it is resized.
        flip: mirror every other view at random.
        views: None draws a new view of every picture in every epoch; V > 0 shows view number `epoch % V`, so
            that what the teacher says about (picture, view) can be kept.
        max_pixels: a picture is skipped if more pixels than this would have to be decoded at once.
        max_bad_share: training stops when more than this share of the pictures cannot be decoded.
        stream_block: remote shards are shuffled in blocks of this many pictures held in memory; 1 keeps the
            shard's own order.
        seed: of the order and of the views.
    """

    source: str | tuple[str, ...]
    kind: Literal["auto", "folder", "tars", "hf"] = "auto"
    split: str | None = None
    column: str | None = None
    workers: int = 2
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    views: int | None = None
    max_pixels: int = 80_000_000
    max_bad_share: float = 0.1
    stream_block: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        def refuse(name: str, right: str) -> None:
            raise ValueError(f"{name} must be {right}, got {getattr(self, name)!r}")

        if not self.source:
            refuse("source", "a folder, tar shards or a dataset on disk")
        if self.kind not in ("auto", "folder", "tars", "hf"):
            refuse("kind", "'auto', 'folder', 'tars' or 'hf'")
        for name in ("split", "column"):
            if getattr(self, name) is not None and self.kind in ("folder", "tars"):
                refuse(name, f"left out where kind is {self.kind!r}: only Hugging Face datasets have one")
        if self.workers < 0:
            refuse("workers", "zero or more")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            refuse("scale", "two shares of the picture, 0 < smallest <= largest <= 1")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            refuse("ratio", "two positive, finite aspect ratios, smallest <= largest")
        if self.views is not None and self.views < 1:
            refuse("views", "one or more, or null for a new view in every epoch")
        if self.max_pixels < 1:
            refuse("max_pixels", "positive")
        if not 0 <= self.max_bad_share <= 1:
            refuse("max_bad_share", "a share between 0 and 1")
        if self.stream_block < 1:
            refuse("stream_block", "one or more")
        if self.seed < 0:
            refuse("seed", "zero or more")
