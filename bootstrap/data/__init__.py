"""Unlabelled pictures: sources, decoding, views, and a stream of batches that resumes exactly."""

from __future__ import annotations

from bootstrap.data.config import DataConfig
from bootstrap.data.decode import BadPictureError, decode_picture
from bootstrap.data.overlap import check_outside, find_shared
from bootstrap.data.places import open_source
from bootstrap.data.skipped import SkippedPictures
from bootstrap.data.source import AnySource, PictureSource, ShardSource
from bootstrap.data.stream import PictureBatch, PictureStream, build_stream, read_in_order
from bootstrap.data.views import EvalView, TrainView, view_seed

__all__ = [
    "AnySource",
    "BadPictureError",
    "DataConfig",
    "EvalView",
    "PictureBatch",
    "PictureSource",
    "PictureStream",
    "ShardSource",
    "SkippedPictures",
    "TrainView",
    "build_stream",
    "check_outside",
    "decode_picture",
    "find_shared",
    "open_source",
    "read_in_order",
    "view_seed",
]
