"""LLaVA's chat records as training batches."""

from __future__ import annotations

from .collate import ChatCollator
from .dataset import ChatDataset, TooManyBadRecordsError
from .encode import IGNORED, ChatEncoder, Encoded
from .records import BadRecordError, Record, parse_record
from .sampling import GroupedSampler
from .sources import FolderSource, JoinedSource, Source, TarSource

__all__ = [
    "IGNORED",
    "BadRecordError",
    "ChatCollator",
    "ChatDataset",
    "ChatEncoder",
    "Encoded",
    "FolderSource",
    "GroupedSampler",
    "JoinedSource",
    "Record",
    "Source",
    "TarSource",
    "TooManyBadRecordsError",
    "parse_record",
]
