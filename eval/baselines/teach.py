"""Trains and asks the half of a LLaVA that every tower gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eval.baselines.config import TrainSettings
from eval.baselines.data import Plan
from eval.baselines.reader import Reader, collate

See = Callable[[Tensor], Tensor | None]
"""Visual tokens of pictures by their numbers; None without pictures."""


def train(
    reader: Reader,
    extra: nn.Module,
    see: See,
    plan: Plan,
    settings: TrainSettings,
    on_step: Callable[[float], object] = lambda loss: None,
) -> list[float]:
    """Trains projector and language model, and what the tower has to train.

    Args:
        reader: Projector and language model.
        extra: The tower; its parameters that require gradients are trained too.
        see: Visual tokens.
        plan: The batches.
        settings: Learning rate and so on.
        on_step: Called with every step's loss.

    Returns:
        The losses.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    reader.train()
    reader.llm.requires_grad_(settings.train_language)
    groups = group_parameters(reader, extra, settings)
    trained = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    losses = []
    steps = len(plan.rows)
    for step, (rows, turns) in enumerate(zip(plan.rows, plan.turns, strict=True)):
        scale = min((step + 1) / max(1, settings.warmup), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * scale
        ids, labels = collate([reader.encode(each) for each in turns], reader.pad)
        loss = reader.measure_tokens(see(rows), ids, labels)[0].mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}: lower training.lr")
        on_step(losses[-1])
    return losses


def group_parameters(reader: Reader, extra: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """What is trained, each with its peak learning rate (`peak_lr`) and weight decay."""
    language = {id(p) for p in reader.llm.parameters()}
    trained = [p for part in (reader, extra) for p in part.parameters() if p.requires_grad]
    others = settings.lr if settings.projector_lr is None else settings.projector_lr
    groups = []
    for is_language, lr in ((True, settings.lr), (False, others)):
        own = [p for p in trained if (id(p) in language) is is_language]
        groups += [
            {"params": [p for p in own if p.ndim >= 2], "peak_lr": lr, "weight_decay": settings.weight_decay},
            {"params": [p for p in own if p.ndim < 2], "peak_lr": lr, "weight_decay": 0.0},
        ]
    return [group for group in groups if group["params"]]


def answer_all(
    reader: Reader,
    questions: Sequence[tuple[str, int]],
    see: See,
    max_new_tokens: int,
    batch: int = 64,
) -> list[str]:
    """Greedy answers.

    Args:
        reader: Projector and language model.
        questions: Questions, each with the number of its picture.
        see: Visual tokens.
        max_new_tokens: Longest answer.
        batch: Prompts of one length at a time; nothing is padded.
    """
    reader.eval()
    prompts = [reader.encode_question(question) for question, _ in questions]
    answers = [""] * len(questions)
    for part in _alike([len(ids) for ids in prompts], batch):
        ids = torch.tensor([prompts[place] for place in part])
        visual = see(torch.tensor([questions[place][1] for place in part]))
        for place, text in zip(part, reader.answer(visual, ids, max_new_tokens), strict=True):
            answers[place] = text
    return answers


@torch.no_grad()
def measure_answers(
    reader: Reader,
    questions: Sequence[tuple[str, int]],
    answers: Sequence[str],
    see: See,
    batch: int = 64,
) -> list[float]:
    """How surprising the right answers are: cross-entropy of each as a whole, in nats.

    Args:
        reader: Projector and language model.
        questions: Questions, each with the number of its picture.
        answers: The right answers.
        see: Visual tokens.
        batch: Questions at a time.
    """
    reader.eval()
    rows = [
        reader.encode([(question, answer)]) for (question, _), answer in zip(questions, answers, strict=True)
    ]
    nats = [0.0] * len(rows)
    for part in _alike([len(ids) for ids, _ in rows], batch):
        ids, labels = collate([rows[place] for place in part], reader.pad)
        visual = see(torch.tensor([questions[place][1] for place in part]))
        losses, owners = reader.measure_tokens(visual, ids, labels)
        sums = torch.zeros(len(part)).index_add_(0, owners, losses)
        for place, value in zip(part, sums.tolist(), strict=True):
            nats[place] = value
    return nats


def _alike(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Places of equal length, so many at a time."""
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    for group in places.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]
