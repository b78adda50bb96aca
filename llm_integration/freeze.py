"""Which parameters a stage trains, and low-rank adapters that stay where they belong."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from .config import TrainSettings

logger = logging.getLogger(__name__)

PROJECTOR = "multi_modal_projector"
TOWER = "vision_tower"
LANGUAGE = "language_model"


def prepare_parameters(model: LlavaForConditionalGeneration, settings: TrainSettings) -> nn.Module:
    """Freeze what the stage does not train, and put adapters in where they are asked for.

    Returns:
        The model, or peft's wrapping of it.
    """
    tuned = settings.tower == "tuned"
    model.requires_grad_(False)
    wrapped: nn.Module = model
    if settings.lora.rank:
        config = LoraConfig(
            r=settings.lora.rank,
            lora_alpha=settings.lora.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.lora.dropout,
            target_modules=adapter_pattern(model, settings.tower == "lora"),
            modules_to_save=[PROJECTOR, *([TOWER] if tuned else [])],
            bias="none",
            task_type="CAUSAL_LM",
        )
        wrapped = get_peft_model(model, config)
    else:
        for name, parameter in model.named_parameters():
            part = part_of(name)
            trained = part == PROJECTOR or (part == TOWER and tuned)
            parameter.requires_grad_(trained or (part == LANGUAGE and settings.stage == "tune"))
    logger.info("trained: %s", describe_trained(wrapped))
    return wrapped


def part_of(name: str) -> str:
    """The part of a LLaVA that a parameter belongs to; the output layer is the language model's."""
    return next((part for part in (PROJECTOR, TOWER) if f"{part}." in name), LANGUAGE)


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that receive gradients."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def describe_trained(model: nn.Module) -> str:
    """How many parameters of which part are trained."""
    counts = dict.fromkeys((PROJECTOR, LANGUAGE, TOWER), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[part_of(name)] += int(getattr(parameter, "ds_numel", parameter.numel()))
    return ", ".join(f"{part} {count:,}" for part, count in counts.items())


def adapter_pattern(model: nn.Module, tower: bool) -> str:
    """A regular expression of the linear layers that get an adapter: the language model's blocks.

    Args:
        model: a LLaVA.
        tower: also the cortex blocks of the tower.

    Raises:
        ValueError: if the language model has no numbered blocks of linear layers.
    """
    leaves: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        for part, blocks in ((LANGUAGE, rf"{LANGUAGE}\.\w+\.\d+\."), (TOWER, r"\.cortex\.blocks\.\d+\.")):
            if f"{part}." in name and re.search(blocks, name):
                leaves.setdefault(part, set()).add(name.rpartition(".")[2])
    if LANGUAGE not in leaves:
        raise ValueError(
            "LoRA: this language model has no numbered blocks with linear layers; train it with lora.rank=0"
        )
    patterns = [rf".*\b{LANGUAGE}\.\w+\.\d+\..*\b({'|'.join(sorted(leaves[LANGUAGE]))})"]
    if tower:
        patterns.append(rf".*\b{TOWER}\.cortex\.blocks\.\d+\..*\b({'|'.join(sorted(leaves.get(TOWER, ())))})")
    return "|".join(f"({pattern})" for pattern in patterns)


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store frozen parameters in another precision; trained ones stay in fp32."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def build_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: a rate for each part, and weight decay on matrices only."""
    rates = {
        PROJECTOR: settings.optim.projector_learning_rate,
        TOWER: settings.optim.tower_learning_rate,
        LANGUAGE: None,
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = rates[part_of(name)]
        rate = settings.optim.learning_rate if own is None else own
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        decay = settings.optim.weight_decay if dimensions > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
