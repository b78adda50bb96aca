"""How answers are decoded: a language model's own settings, and what of them greedy answers leave out."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import GenerationConfig

GREEDY: Mapping[str, Any] = MappingProxyType(
    {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
)
"""For ``generate``: the likeliest token every time.

A language model's own settings may hold a penalty on words that the prompt has (Qwen2.5's do), meant for
sampled answers: under it "yes" and "B" are less likely wherever a question offers them.
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


def choose_decoding(temperature: float) -> dict[str, Any]:
    """For ``generate``: greedy at temperature 0, otherwise drawn, with the model's own other settings."""
    sampled = {"do_sample": True, "num_beams": 1, "temperature": temperature}
    return sampled if temperature else dict(GREEDY)
