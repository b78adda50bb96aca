"""What looking costs: multiply-adds and pictures per second, teacher against student in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_gmacs(
    look: Callable[[torch.Tensor], Any], image_size: tuple[int, int], device: str = "cpu"
) -> float:
    """Billions of multiply-adds for one picture, by PyTorch's counter.

    Args:
        look: a forward pass over (1, 3, H, W), without parameters that require gradients: the counter trips
            over them.
        image_size: height and width in pixels.
        device: where the model is.
    """
    return count_work(lambda: look(torch.zeros(1, 3, *image_size, device=device)))


def count_work(work: Callable[[], Any]) -> float:
    """Billions of multiply-adds in matrix products, convolutions and attention, by PyTorch's counter.

    The counter does not know fused attention on every device, nor `nn.MultiheadAttention`'s fast path: both
    are switched off while it counts.

    Args:
        work: what to count, without parameters that require gradients.
    """
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2e9


def measure_speed(
    looks: Mapping[str, Callable[[torch.Tensor], Any]], images: torch.Tensor, rounds: int = 7
) -> dict[str, float]:
    """Pictures per second of several encoders, in turn, so that a noisy machine hurts all of them alike.

    Args:
        looks: forward passes over ``images`` by name.
        images: (B, 3, H, W).
        rounds: how often each runs, after one warm-up; the median counts.

    Returns:
        Pictures per second by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in looks}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, look in looks.items():
                started = time.perf_counter()
                look(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    return {name: images.shape[0] / statistics.median(values) for name, values in seconds.items()}
