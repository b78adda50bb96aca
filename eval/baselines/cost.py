"""What a point costs until an answer begins: multiply-adds, and milliseconds in turn with the others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bootstrap.cost import count_work
from eval.baselines.reader import Reader
from eval.costs.clock import Timing, take_turns
from eval.towers import Tower


@torch.no_grad()
def count_parts(tower: Tower | None, reader: Reader, image: Tensor, prompt: int) -> dict[str, float]:
    """GMACs for one picture and a question of usual length.

    Args:
        tower: The tower; None without pictures.
        reader: Projector and language model.
        image: (1, 3, H, W).
        prompt: Tokens of the question.
    """
    for part in (tower, reader):
        if part is not None:
            part.requires_grad_(False)  # torch's counter trips over parameters that require gradients
    inputs = reader.embed(None if tower is None else tower(image), _blank(prompt))
    parts = {"tower": 0.0, "projector": 0.0, "prefill": count_work(lambda: prefill(reader, inputs))}
    if tower is not None:
        visual = tower(image)
        parts["tower"] = count_work(lambda: tower(image))
        parts["projector"] = count_work(lambda: reader.project(visual))
    return {**parts, "total": sum(parts.values())}


def _blank(prompt: int) -> Tensor:
    return torch.zeros(1, prompt, dtype=torch.long)


def prefill(reader: Reader, inputs: Tensor) -> Tensor:
    """From what the language model reads to the logits of the first word of an answer."""
    states = reader.llm.model(inputs_embeds=inputs, use_cache=True).last_hidden_state
    logits: Tensor = reader.llm.lm_head(states[:, -1])
    return logits


@torch.inference_mode()
def time_points(
    towers: Mapping[str, Tower | None], reader: Reader, image: Tensor, prompt: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds from pixels to the first word, one picture at a time, by the names of the points.

    Of processor time: with one thread it is what a clock shows on a free core, and other work on the machine
    does not pass for a tower's.

    Args:
        towers: Of the points, by name; None without pictures.
        reader: Projector and language model; its weights do not matter here.
        image: (1, 3, H, W).
        prompt: Tokens of the question.
        rounds: Measurements of each, all points one after another in every round.
    """
    reader.eval()

    def look(tower: Tower | None) -> Tensor | None:
        return None if tower is None else tower(image)

    def begin(tower: Tower | None) -> Tensor:
        return prefill(reader, reader.embed(look(tower), _blank(prompt)))

    begins = {name: partial(begin, tower) for name, tower in towers.items()}
    looks = {name: partial(look, tower) for name, tower in towers.items()}
    seeing, whole = (take_turns(works, rounds, "cpu", time.process_time) for works in (looks, begins))
    return {name: _milliseconds(seeing[name], whole[name]) for name in towers}


def _milliseconds(seeing: Timing, whole: Timing) -> dict[str, Any]:
    return {
        "tower": 1e3 * seeing.median,
        "total": 1e3 * whole.median,
        "quartiles": [1e3 * whole.low, 1e3 * whole.high],
        "rounds": whole.rounds,
    }
