"""Timing in turn: every round runs every candidate once, so that a noisy machine hurts all of them alike.

The order turns by one place each round, so that nobody always runs after the same neighbour.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bootstrap.figures import align
from eval.costs.clock import Timing, summarise, wait


@dataclass(frozen=True)
class Laps:
    """Seconds of one candidate, one entry a round.

    Attributes:
        wall: By the wall clock.
        cpu: Processor time of this process, all threads together; what other processes take is not in it.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def times(self, clock: str) -> tuple[float, ...]:
        """The entries of one clock, "wall" or "cpu"."""
        return self.wall if clock == "wall" else self.cpu

    def summary(self, clock: str) -> Timing:
        """Median and quartiles of one clock."""
        return summarise(self.times(clock))


def take_turns(works: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, Laps]:
    """Times several pieces of work, one after the other in every round.

    Args:
        works: What to time, by name; each runs once before, uncounted.
        rounds: How often.
        device: Its work is waited for.
    """
    wall: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            work = works[name]
            wait(device)
            started, spent = time.perf_counter(), time.process_time()
            work()
            wait(device)
            if turn:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - spent)
    return {name: Laps(tuple(wall[name]), tuple(cpu[name])) for name in works}


def ratio(slow: Laps, fast: Laps, clock: str) -> Timing:
    """How many times longer one candidate took than another: median and quartiles of the rounds' ratios."""
    pairs = zip(slow.times(clock), fast.times(clock), strict=True)
    return summarise([above / below for above, below in pairs])


def has_bf16(device: str) -> bool:
    """Whether this CPU multiplies matrices in bf16; other devices are asked by their own flags."""
    return not device.startswith("cuda") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matrix_product(device: str, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A large square matrix product to measure the processor by.

    Returns:
        The work, and its floating-point operations.
    """
    side, times = (8192, 4) if device.startswith("cuda") else (1024, 2)
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)

    def work() -> None:
        for _ in range(times):
            left @ right

    return work, 2.0 * times * side**3


def format_spread(timing: Timing, digits: int = 3) -> str:
    """A median with its quartiles in brackets."""
    return f"{timing.median:.{digits}g} [{timing.low:.{digits}g}, {timing.high:.{digits}g}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, the first one left-aligned."""
    return align([head, *rows])
