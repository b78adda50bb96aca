"""What a training step takes: forward, backward and AdamW, one subject after the other."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from eval.costs.clock import Timing, take_turns
from eval.costs.shapes import Subject
from llm_integration.config import DataSettings, LoraSettings, TrainSettings
from llm_integration.data import IGNORED
from llm_integration.freeze import build_groups, prepare_parameters

Stage = Literal["align", "lora", "tune"]
RANK = 128  # LLaVA 1.5's


@dataclass(frozen=True)
class StepCost:
    """Of one batch of conversations about one picture each.

    Attributes:
        stage: "align" trains the projector, "lora" adapters and projector, "tune" language model and
            projector; the tower is frozen in all of them.
        batch: Conversations.
        tokens: Of one conversation, visual ones included.
        trained: Parameters that are trained.
        step: Seconds of a step; None where memory did not suffice.
        peak_bytes: Most GPU memory in use; None on a CPU, or where memory did not suffice.
    """

    stage: str
    batch: int
    tokens: int
    trained: int
    step: Timing | None
    peak_bytes: int | None


def measure_steps(
    subject: Subject,
    stage: Stage,
    batches: list[int],
    words: int,
    answer: int,
    rounds: int,
    device: str,
    checkpointing: bool = False,
) -> list[StepCost]:
    """Times training steps of one subject, which is changed by it.

    As in `llm_integration.train` on one device: frozen weights keep the subject's precision, trained ones
    and their moments are fp32, and where the subject is not fp32 the forward pass runs under autocast.

    Args:
        subject: A LLaVA with weights.
        stage: What is trained.
        batches: Conversations a step, several to be tried.
        words: Tokens of a question.
        answer: Tokens of an answer, which the loss covers.
        rounds: Timed steps of each batch.
        device: Where the subject is.
        checkpointing: Recompute activations in the backward pass.
    """
    dtype = next(subject.model.parameters()).dtype
    settings = TrainSettings(
        model=Path(),
        out=Path(),
        data=DataSettings(records=(Path("chat.json"),)),
        stage="align" if stage == "align" else "tune",
        lora=LoraSettings(RANK if stage == "lora" else 0),
    )
    model: Any = prepare_parameters(subject.model, settings)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    made = []
    try:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        fits = True
    except torch.cuda.OutOfMemoryError:
        fits = False
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    optimiser = torch.optim.AdamW(build_groups(model, settings), lr=1e-6)
    for batch in batches:
        length = subject.tokens + words + answer
        step, peak = None, None
        if fits:
            work = _build_step(subject, model, optimiser, batch, words, answer, device, dtype)
            step, peak = time_steps(work, rounds, device)
        made.append(StepCost(stage, batch, length, trained, step, peak))
        _free(model, device)
    return made


def _build_step(
    subject: Subject,
    model: Any,
    optimiser: torch.optim.Optimizer,
    batch: int,
    words: int,
    answer: int,
    device: str,
    dtype: torch.dtype,
) -> Callable[[], None]:
    pixels = torch.randn(batch, 3, *subject.image_size, device=device).to(dtype)
    ids = torch.ones(batch, subject.tokens + words + answer, dtype=torch.long, device=device)
    ids[:, : subject.tokens] = model.config.image_token_id
    labels = ids.clone()
    labels[:, :-answer] = IGNORED

    def step() -> None:
        with torch.autocast(device.partition(":")[0], dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def time_steps(work: Callable[[], None], rounds: int, device: str) -> tuple[Timing | None, int | None]:
    """Seconds of a step, and the most memory on a GPU; None where memory did not suffice."""
    cuda = device.startswith("cuda")
    try:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        timing = take_turns({"step": work}, rounds, device)["step"]
    except torch.cuda.OutOfMemoryError:
        return None, None
    return timing, int(torch.cuda.max_memory_allocated(device)) if cuda else None


def _free(model: Any, device: str) -> None:
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
