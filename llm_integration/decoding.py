"""How answers are decoded: a language model's own settings, and what of them greedy answers leave out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY: Mapping[str, Any] = MappingProxyType(
    {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
)
"""For ``generate``: the likeliest token every time.

A language model's own settings may hold a penalty on words that the prompt has (Qwen2.5's do), meant for
sampled answers: under it "yes" and "B" are less likely wherever a question offers them, and in a batch so is
the token that fills rows up, which may be the one that ends an answer.
"""

# What is read only where tokens are drawn, or only where there are beams, as transformers has it.
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("early_stopping", "length_penalty")


def drop_idle(settings: GenerationConfig) -> None:
    """Take out what nothing reads: a temperature without sampling, a length penalty without beams.

    Published settings hold such (Vicuna's do); transformers reads them, and refuses to write them.
    """
    idle = [] if settings.do_sample else [*_SAMPLED]
    idle += _BEAMS if settings.num_beams in (None, 1) else ()
    for name in idle:
        if getattr(settings, name, None) is not None:
            setattr(settings, name, None)


def keep_silent(settings: GenerationConfig, token: int) -> None:
    """Make answers leave a token out: the image token, whose place is in prompts."""
    settings.suppress_tokens = sorted({*(settings.suppress_tokens or ()), token})


def choose_decoding(temperature: float) -> dict[str, Any]:
    """For ``generate``: greedy at temperature 0, otherwise drawn, with the model's own other settings."""
    sampled = {"do_sample": True, "num_beams": 1, "temperature": temperature}
    return sampled if temperature else dict(GREEDY)


def draw_each(settings: GenerationConfig, temperature: float, keys: Sequence[str]) -> dict[str, Any]:
    """For ``generate`` on a batch: greedy at temperature 0, otherwise each row drawn for itself.

    Args:
        settings: the model's own, of which top-k and top-p count.
        temperature: 0 or more.
        keys: a row's random numbers are those of its key, whatever its neighbours.
    """
    if not temperature:
        return dict(GREEDY)
    return {**GREEDY, "logits_processor": LogitsProcessorList([Draws(settings, temperature, keys)])}


class Draws(LogitsProcessor):
    """Draws each row's next token, which greedy decoding then takes.

    transformers draws all rows from one stream of random numbers, so that an answer would be another one in
    another batch, or after a restart.

    Args:
        settings: the model's own, of which top-k and top-p count.
        temperature: greater than 0.
        keys: one a row.
    """

    def __init__(self, settings: GenerationConfig, temperature: float, keys: Sequence[str]) -> None:
        self.streams = [random.Random(key) for key in keys]
        self.limits = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if settings.top_k:
            self.limits.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1:
            self.limits.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) that are 0 for the token drawn and minus infinity for all others."""
        limited: Any = self.limits(input_ids, scores.float())  # type: ignore[arg-type]
        upto = limited.double().softmax(dim=-1).cumsum(dim=-1)
        # Doubles: as a float a number just below 1 would be 1, and no sum exceeds that.
        numbers = upto.new_tensor([[stream.random()] for stream in self.streams])
        # The first token whose sum exceeds the number: one of no probability adds nothing to its own.
        drawn = torch.searchsorted(upto, numbers * upto[:, -1:], right=True)
        drawn = drawn.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)
