"""Which pictures make up each batch, and where in the order it ends: the part that makes resume exact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bootstrap.data.order import block_order, epoch_order
from bootstrap.data.source import PictureSource, ShardSource, Streamed

# A streamed picture's index is its shard's number and its place in the shard.
MEMBER_BITS = 28


class Position(NamedTuple):
    """Where one rank is in its order: `offset` pictures into its `shard`-th shard of `epoch`.

    With random access there are no shards and `offset` counts from the start of the epoch.
    """

    epoch: int = 0
    shard: int = 0
    offset: int = 0


class Wanted(NamedTuple):
    """One picture to decode: its index, its view, and its bytes where it was streamed."""

    number: int
    view: int
    name: str | None = None
    data: bytes | None = None


class Task(NamedTuple):
    """One batch to decode, and the position after it."""

    wanted: tuple[Wanted, ...]
    after: Position


class Planner:
    """Plans batches without end, from any position, as a pure function of its arguments.

    Batches may straddle epochs, so that every picture is shown once in every epoch whatever the batch size.

    Args:
        source: the pictures.
        batch_size: pictures in a batch.
        seed: of the order.
        views: None, or the number of views that come round.
        rank: of this process.
        world_size: number of processes.
        stream_block: pictures shuffled together in a streamed shard.

    Raises:
        ValueError: there is not at least one picture, or shard, for every process.
    """

    def __init__(
        self,
        source: PictureSource | ShardSource,
        batch_size: int,
        seed: int,
        views: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        stream_block: int = 256,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size must be one or more, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.views = views
        self.rank = rank
        self.world_size = world_size
        self.stream_block = stream_block
        self.count = len(source) if isinstance(source, PictureSource) else len(source.shards)
        if self.count < world_size:
            what = "pictures" if isinstance(source, PictureSource) else "shards"
            raise ValueError(
                f"{source.title} has {self.count} {what}, fewer than the {world_size} processes: "
                f"use at most {self.count} processes or more {what}"
            )

    def share(self, epoch: int) -> np.ndarray:
        """This rank's pictures (or shards, where streamed) of one epoch, in order."""
        return epoch_order(self.count, self.seed, epoch, self.rank, self.world_size)

    def tasks(self, start: Position) -> Iterator[Task]:
        """Batches from a position on, without end.

        Raises:
            ValueError: a whole epoch of shards had no picture.
        """
        wanted: list[Wanted] = []
        for item, after in self._items(start):
            wanted.append(item)
            if len(wanted) == self.batch_size:
                yield Task(tuple(wanted), after)
                wanted = []

    def _items(self, start: Position) -> Iterator[tuple[Wanted, Position]]:
        epoch, shard, offset = start
        while True:
            view = epoch if self.views is None else epoch % self.views
            if isinstance(self.source, PictureSource):
                share = self.share(epoch)
                for place in range(offset, len(share)):
                    yield Wanted(int(share[place]), view), self._next(epoch, 0, place + 1, len(share))
            else:
                found = shard > 0 or offset > 0
                for item in self._streamed_epoch(self.source, epoch, shard, offset, view):
                    found = True
                    yield item
                if not found:
                    raise ValueError(
                        f"no pictures in any of {len(self.share(epoch))} shard(s) of {self.source.title}: "
                        "are they reachable, and tars of pictures?"
                    )
            epoch, shard, offset = epoch + 1, 0, 0

    def _streamed_epoch(
        self, source: ShardSource, epoch: int, shard: int, offset: int, view: int
    ) -> Iterator[tuple[Wanted, Position]]:
        share = self.share(epoch)
        for place in range(shard, len(share)):
            number = int(share[place])
            first = offset - offset % self.stream_block if place == shard else 0
            skip = offset - first if place == shard else 0
            block: list[Streamed] = []
            stream = source.stream(number, start=first)
            while True:
                block = [picture for _, picture in zip(range(self.stream_block), stream, strict=False)]
                order = block_order(len(block), self.seed, epoch, number, first // self.stream_block)
                for done, chosen in enumerate(order):
                    if done < skip:
                        continue
                    picture = block[int(chosen)]
                    index = (number << MEMBER_BITS) + picture.member
                    yield (
                        Wanted(index, view, picture.name, picture.data),
                        Position(epoch, place, first + done + 1),
                    )
                if len(block) < self.stream_block:
                    break
                first, skip = first + len(block), 0

    def _next(self, epoch: int, shard: int, offset: int, length: int) -> Position:
        return Position(epoch, shard, offset) if offset < length else Position(epoch + 1, 0, 0)
