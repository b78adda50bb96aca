"""What takes a clock: seeing, the first token, the following ones, memory; several models in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.costs.memory import measure_growth, weigh
from eval.costs.shapes import Subject


@dataclass(frozen=True)
class Timing:
    """Seconds of one piece of work.

    Attributes:
        median: Over the rounds.
        low: Their first quartile.
        high: Their third.
        rounds: How many there were, warm-up aside.
    """

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Measured:
    """Of one batch of questions about one picture each.

    Attributes:
        batch: Questions.
        see: The tower and the projector.
        first_token: From pixels to the first token.
        decode: One further token.
        peak_bytes: The model's weights, and the most that all other tensors take at once until the first
            token.
        cache_bytes: Of keys and values after the prompt, all questions together.
    """

    batch: int
    see: Timing
    first_token: Timing
    decode: Timing
    peak_bytes: int
    cache_bytes: int


def take_turns(
    works: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times several pieces of work, one after the other in every round, so that a noisy machine hurts all.

    Args:
        works: What to time, by name; each runs once before, uncounted.
        rounds: How often.
        device: Its work is waited for.
        clock: Of the day, or of this process alone (`time.process_time`).
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            wait(device)
            started = clock()
            work()
            wait(device)
            if turn:
                seconds[name].append(clock() - started)
    return {name: summarise(values) for name, values in seconds.items()}


def summarise(values: Sequence[float]) -> Timing:
    """Median and quartiles."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def wait(device: str) -> None:
    """Until the device has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure(
    subjects: Sequence[Subject], batch: int, words: int, rounds: int, device: str, compiled: bool = False
) -> dict[str, Measured]:
    """Measures all subjects in turn.

    Args:
        subjects: LLaVAs.
        batch: Questions at once, one picture each.
        words: Tokens of a question.
        rounds: How often each piece of work is timed.
        device: Where the subjects are.
        compiled: Compile towers and language models first, each for its own shapes.
    """
    if compiled:
        # Beyond a few shapes a compiled function goes on uncompiled; every batch size begins anew.
        torch.compiler.reset()
    jobs = {subject.name: _Job(subject, batch, words, device, compiled) for subject in subjects}
    see = take_turns({name: job.see for name, job in jobs.items()}, rounds, device)
    first = take_turns({name: job.first_token for name, job in jobs.items()}, rounds, device)
    decode = take_turns({name: job.decode for name, job in jobs.items()}, rounds, device)
    return {
        name: Measured(batch, see[name], first[name], decode[name], job.measure_peak(), job.cache_bytes)
        for name, job in jobs.items()
    }


class _Job:
    """One subject's pieces of work."""

    def __init__(self, subject: Subject, batch: int, words: int, device: str, compiled: bool) -> None:
        model = subject.model
        weight = next(model.parameters())
        self.device = device
        self.pixels = torch.randn(batch, 3, *subject.image_size, device=device).to(weight.dtype)
        image = model.config.image_token_id
        self.ids = torch.ones(batch, subject.tokens + words, dtype=torch.long, device=device)
        self.ids[:, : subject.tokens] = image
        self.next = torch.ones(batch, 1, dtype=torch.long, device=device)
        self.model, self.subject = model, subject
        if compiled:
            model.model.vision_tower.compile(dynamic=False)
            model.model.language_model.compile(dynamic=False)
        output = self._prefill()
        # transformers has renamed it: the argument is called as the result is.
        self.cache_name = "cache" if getattr(output, "cache", None) is not None else "past_key_values"
        self.cache = output[self.cache_name]
        self.cache_bytes = sum(
            tensor.numel() * tensor.element_size()
            for layer in self.cache.layers
            for tensor in (layer.keys, layer.values)
        )

    def _prefill(self) -> Any:
        output = self.model(input_ids=self.ids, pixel_values=self.pixels, use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(-1)
        return output

    def see(self) -> None:
        """Pictures to visual tokens."""
        self.subject.see(self.pixels)

    def first_token(self) -> None:
        """Pictures and words to the first token."""
        self._prefill()

    def decode(self) -> None:
        """One further token; the cache is cut back, so that every round does the same."""
        given = {self.cache_name: self.cache}
        self.model(input_ids=self.next, use_cache=True, **given).logits.argmax(-1)
        self.cache.crop(-1)

    def measure_peak(self) -> int:
        """Weights, and the most that a first token needs besides."""
        return weigh(self.model) + measure_growth(self._prefill, self.device)
