"""Batches of one modality and of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Every epoch in a new order, a function of seed and epoch alone.

    Examples are drawn into global batches (all processes together) that hold either only conversations with
    pictures or only conversations without, of similar length; the order of the batches is random. What is
    left over of both kinds when their numbers do not divide comes last.

    Args:
        lengths: of the examples, in any unit.
        with_picture: whether an example has a picture.
        global_batch: examples in one step of all processes.
        seed: of the order.
        pool: how many global batches are drawn together before they are sorted by length.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        with_picture: Sequence[bool],
        global_batch: int,
        seed: int,
        pool: int = 50,
    ) -> None:
        self.lengths = list(lengths)
        self.with_picture = list(with_picture)
        self.global_batch = global_batch
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next.

        Not called ``set_epoch``: accelerate would find that, if not everywhere, and begin with 0 after a
        restart.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        full: list[list[int]] = []
        rest: list[int] = []
        for kind in (True, False):
            members = [index for index, has in enumerate(self.with_picture) if has == kind]
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            size = self.pool * self.global_batch
            for start in range(0, len(order), size):
                drawn = sorted(order[start : start + size], key=lambda index: -self.lengths[index])
                batches = [drawn[i : i + self.global_batch] for i in range(0, len(drawn), self.global_batch)]
                if batches and len(batches[-1]) < self.global_batch:
                    rest += batches.pop()
                full += batches
        for number in torch.randperm(len(full), generator=generator).tolist():
            yield from full[number]
        yield from rest
