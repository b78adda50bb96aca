"""The most memory that tensors take during a piece of work, on a GPU or a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

_EVENT = "[memory]"  # what the profiler calls an allocation or a release


def measure_growth(work: Callable[[], Any], device: str) -> int:
    """Bytes of tensors that are alive at once on top of those that were there before, at most.

    On a GPU the allocator tells. On a CPU it does not, and the process' own size is no answer: the system's
    allocator keeps what was released. There the profiler reports every allocation and release of a tensor.

    Args:
        work: What to run, once.
        device: Where its tensors are.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silence():
        record.start()
    try:
        work()
    finally:
        with _silence():
            record.stop()
    assert record.profiler is not None
    results: Any = record.profiler.kineto_results
    now = most = 0
    for event in results.events():
        if event.name() == _EVENT:
            now += event.nbytes()
            most = max(most, now)
    return most


@contextmanager
def _silence() -> Iterator[None]:
    """Hides what the profiler's own code prints about GPUs that are not there."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def weigh(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
