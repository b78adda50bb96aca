"""Training examples by index; bad records are counted, skipped, and in the end not tolerated."""

from __future__ import annotations

import logging
import multiprocessing
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from sparse_vlm.preemption import ignore_in_worker

from .encode import ChatEncoder
from .records import BadRecordError, Record
from .sources import Source

logger = logging.getLogger(__name__)


class TooManyBadRecordsError(RuntimeError):
    """More bad records than the configuration allows."""


class ChatDataset(Dataset[dict[str, Any]]):
    """Conversations ready for the collator.

    Every record is read once when the data set is built: its turns, its marks, whether its pictures exist.
    What only shows later, a broken picture or an answer cut away, makes the next good record of the same kind
    take its place.

    Args:
        source: where records and pictures lie.
        encoder: makes ids and labels.
        image_processor: makes pixels, as transformers' image processors do.
        max_bad_records: how many bad records (of this process) are skipped before training stops.
        limit: use only the first so many records.

    Raises:
        TooManyBadRecordsError: naming the last one.
        ValueError: if no record is left.
    """

    def __init__(
        self,
        source: Source,
        encoder: ChatEncoder,
        image_processor: Any,
        max_bad_records: int,
        limit: int | None = None,
    ) -> None:
        self.source = source
        self.encoder = encoder
        self.image_processor = image_processor
        self.max_bad_records = max_bad_records
        count = len(source) if limit is None else min(limit, len(source))
        # Shared with the loader's workers, which are new in every epoch: a record is bad once.
        self._bad = multiprocessing.Array("b", count)
        self._count = multiprocessing.Value("i", 0)
        self._cut = multiprocessing.Array("b", count)
        self._ignores_sigterm: bool | None = None
        self.good: list[int] = []
        self.lengths: list[int] = []
        self.with_picture: list[bool] = []
        for index in tqdm(range(count), desc="records", unit="", disable=None):  # a bar on terminals only
            try:
                record = source.read(index)
            except BadRecordError as error:
                self._note(index, error)
                continue
            self.good.append(index)
            self.lengths.append(self._estimate(record))
            self.with_picture.append(bool(record.pictures))
        if not self.good:
            raise ValueError("there is no good record to train on")

    @property
    def bad_records(self) -> int:
        """How many records were found bad so far, by this process and its loader workers."""
        return int(self._count.value)

    @property
    def cut_records(self) -> int:
        """How many records were cut at the longest length so far, by this process and its loader workers."""
        return sum(memoryview(self._cut.get_obj()).cast("B"))

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self._ignores_sigterm is None:
            self._ignores_sigterm = get_worker_info() is not None
            if self._ignores_sigterm:
                ignore_in_worker()
        for step in range(len(self.good)):
            place = (position + step) % len(self.good)
            index = self.good[place]
            if self._bad[index] or self.with_picture[place] != self.with_picture[position]:
                continue
            try:
                return self._load(index)
            except BadRecordError as error:
                self._note(index, error)
        raise TooManyBadRecordsError("no good record is left of this kind")

    def _load(self, index: int) -> dict[str, Any]:
        record = self.source.read(index)
        encoded = self.encoder.encode(record.messages, record.where)
        self._cut[index] = encoded.cut > 0
        example: dict[str, Any] = {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
        }
        if record.pictures:
            pictures = [self.source.open_picture(index, name) for name in record.pictures]
            example["pixel_values"] = self._prepare(pictures, record.where)
        return example

    def _prepare(self, pictures: list[Any], where: str) -> torch.Tensor:
        try:
            pixels = self.image_processor([p.convert("RGB") for p in pictures], return_tensors="pt")
        except (OSError, ValueError) as error:
            raise BadRecordError(f"{where}: its picture cannot be prepared ({error})") from error
        return torch.as_tensor(pixels["pixel_values"])

    def _estimate(self, record: Record) -> int:
        # Good enough to sort by; tokenizing everything beforehand would take as long as an epoch of reading.
        characters = sum(len(message["content"]) for message in record.messages)
        return characters // 4 + len(record.pictures) * self.encoder.num_tokens

    def _note(self, index: int, error: BadRecordError) -> None:
        with self._count.get_lock():
            if self._bad[index]:
                return
            self._bad[index] = 1
            self._count.value += 1
        logger.warning("skipped: %s", error)
        if self._count.value > self.max_bad_records:
            raise TooManyBadRecordsError(
                f"{self._count.value} bad records, {self.max_bad_records} are allowed "
                f"(data.max_bad_records); the last: {error}"
            )
