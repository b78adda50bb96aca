"""How far a language model reads: what goes beyond its last position makes no sense to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class PromptTooLongError(ValueError):
    """Prompts that leave a language model no position for an answer.

    Args:
        reasons: a sentence for each, by its place among the conversations.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = dict(reasons)


def count_positions(text_config: Any) -> int | None:
    """Positions of a language model; None where its configuration names none.

    Rotary positions that are stretched reach further than those that the model was first trained with, which
    is what some configurations go on to name.
    """
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        return None
    rotary = getattr(text_config, "rope_parameters", None) or {}
    # Kinds of layers may have rotary positions of their own, by name.
    kinds = [kind for kind in (rotary, *rotary.values()) if isinstance(kind, Mapping)]
    stretched = [
        float(kind["factor"]) * (kind.get("original_max_position_embeddings") or positions)
        for kind in kinds
        if kind.get("factor")
    ]
    return int(max(positions, *stretched)) if stretched else int(positions)


def check_room(prompts: Sequence[int], visual: Sequence[int], positions: int | None) -> None:
    """See that every prompt leaves room for an answer.

    Args:
        prompts: tokens of each.
        visual: those of them that stand for pictures.
        positions: of the language model.

    Raises:
        PromptTooLongError: if one does not.
    """
    reasons = {
        place: f"the prompt is {prompt} tokens long, {seen} of them for pictures, and the language model has "
        f"{positions} positions: ask with fewer pictures or words"
        for place, (prompt, seen) in enumerate(zip(prompts, visual, strict=True))
        if positions is not None and prompt >= positions
    }
    if reasons:
        raise PromptTooLongError(reasons)


class LastPosition(StoppingCriteria):
    """Ends each answer of a batch at the language model's last position.

    Args:
        rooms: how many tokens there is room for, one number a prompt.
        start: tokens of the prompts, with what fills them up.
    """

    def __init__(self, rooms: Sequence[int], start: int) -> None:
        self.rooms, self.start = torch.tensor(rooms), start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows have come to an end, (B,); a prompt may have several rows, for beams."""
        rooms = self.rooms.repeat_interleave(input_ids.shape[0] // len(self.rooms))
        return (input_ids.shape[1] - self.start >= rooms).to(input_ids.device)
