"""Settings of instruction tuning, as frozen dataclasses that refuse what makes no sense."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from sparse_vlm.settings import SettingsError, build_settings, refuse_twice


@dataclass(frozen=True)
class DataSettings:
    """What is trained on.

    Attributes:
        records: chat files in LLaVA's format.
        pictures: the folder their picture paths start from; by default each chat file's own.
        shards: webdataset tars (or glob patterns) with records and pictures together.
        template: ``own`` (the model directory's), ``vicuna_v1``, ``plain`` or ``chatml``.
        max_length: tokens, image tokens included, after which a conversation is cut; never more than the
            language model has positions.
        max_bad_records: how many bad records each process skips before it stops.
        group: ``modality`` for batches of one modality and similar length, ``none`` for plain shuffling.
        limit: use only the first so many records.
        workers: loader processes; by default four, or as many as there are cores.
    """

    records: tuple[Path, ...] = ()
    pictures: Path | None = None
    shards: tuple[str, ...] = ()
    template: str = "own"
    max_length: int = 2048
    max_bad_records: int = 100
    group: Literal["modality", "none"] = "modality"
    limit: int | None = None
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))

    def __post_init__(self) -> None:
        if not self.records and not self.shards:
            raise ValueError("name chat files (records) or tars (shards)")
        if self.pictures is not None and not self.records:
            raise ValueError("pictures is the folder of records; there are none")
        if self.max_length < 2 or self.max_bad_records < 0 or self.workers < 0:
            raise ValueError("max_length must be at least 2, max_bad_records and workers at least 0")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1, or null for all records")


@dataclass(frozen=True)
class HeldoutSettings:
    """Conversations that are never trained on; their loss is logged while others are.

    Template, longest length and number of bad records are those of ``data``.

    Attributes:
        records: as ``data.records``; none, and no shards, for no evaluation.
        pictures: as ``data.pictures``.
        shards: as ``data.shards``.
        limit: use only the first so many records.
        every: updates between two evaluations; 0 for only before the first update and after the last.
    """

    records: tuple[Path, ...] = ()
    pictures: Path | None = None
    shards: tuple[str, ...] = ()
    limit: int | None = None
    every: int = 500

    def __post_init__(self) -> None:
        if self.pictures is not None and not self.records:
            raise ValueError("pictures is the folder of records; there are none")
        if self.every < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("every must be at least 0, limit at least 1, or null for all records")
        if not self and (self.limit, self.every) != (None, type(self).every):
            raise ValueError("limit and every are of held-out conversations: name their records or shards")

    def __bool__(self) -> bool:
        return bool(self.records or self.shards)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters in place of the language model's own weights.

    Attributes:
        rank: of the adapters; 0 for none, which trains the weights themselves.
        alpha: scale of an adapter is alpha / rank.
        dropout: on the adapters' input.
    """

    rank: int = 0
    alpha: float = 256.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 <= self.dropout < 1 or not 0 < self.alpha < math.inf:
            raise ValueError("rank must be at least 0, alpha greater than 0, dropout in [0, 1)")


@dataclass(frozen=True)
class OptimSettings:
    """AdamW, linear warm-up, then a schedule.

    Attributes:
        learning_rate: of the language model (or its adapters), and of whatever has no rate of its own.
        projector_learning_rate: of the projector.
        tower_learning_rate: of the tower.
        weight_decay: on matrices.
        warmup_fraction: part of all steps.
        schedule: ``cosine``, ``linear`` or ``constant``.
        clip: gradients are scaled down to this norm.
    """

    learning_rate: float = 2e-5
    projector_learning_rate: float | None = None
    tower_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup_fraction: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise ValueError("learning_rate must be greater than 0, weight_decay at least 0, both finite")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be in [0, 1), got {self.warmup_fraction}")
        if not self.clip > 0:
            raise ValueError(f"clip must be greater than 0 (a large one clips nothing), got {self.clip}")
        for name in ("projector_learning_rate", "tower_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} must be greater than 0, or null for learning_rate; got {rate}")


@dataclass(frozen=True)
class TrainSettings:
    """One run of instruction tuning.

    Attributes:
        model: an assembled LLaVA directory, or the result of an earlier run.
        out: the run's directory.
        data: see :class:`DataSettings`.
        heldout: see :class:`HeldoutSettings`.
        stage: ``align`` trains the projector, ``tune`` projector and language model.
        tower: ``frozen``, ``tuned`` (all its weights), or ``lora`` (adapters in its cortex, with lora.rank).
        lora: see :class:`LoraSettings`.
        optim: see :class:`OptimSettings`.
        batch: conversations in a step of one process.
        accumulation: steps whose gradients are summed before an update.
        epochs: passes over the data, unless max_steps says otherwise.
        max_steps: updates.
        precision: ``bf16`` or ``fp32``.
        gradient_checkpointing: recompute activations in the backward pass.
        deepspeed: a DeepSpeed JSON, used under the ``deepspeed`` launcher; without a launcher one device
            trains without DeepSpeed, which the log says.
        checkpoint_every: updates between checkpoints; 0 for none.
        keep_checkpoints: how many of them are kept.
        log_every: updates between log lines.
        report_to: where the Trainer reports beside ``log.jsonl``: ``tensorboard``, ``wandb`` and whatever
            else it knows and is installed; tensorboard's files lie in ``out / "tensorboard"``.
        resume: go on from the newest checkpoint in ``out``, if there is one. False begins anew and deletes
            the checkpoints and the log of an earlier run there.
        self_contained: write the result as one plain LLaVA directory instead of by reference.
        seed: of everything random.
    """

    model: Path
    out: Path
    data: DataSettings
    heldout: HeldoutSettings = field(default_factory=HeldoutSettings)
    stage: Literal["align", "tune"] = "tune"
    tower: Literal["frozen", "tuned", "lora"] = "frozen"
    lora: LoraSettings = field(default_factory=LoraSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    batch: int = 16
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    deepspeed: Path | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    report_to: tuple[str, ...] = ()
    resume: bool = True
    self_contained: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.accumulation, self.log_every, self.keep_checkpoints) < 1:
            raise ValueError("batch, accumulation, log_every and keep_checkpoints must be at least 1")
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be 0 or more, got {self.checkpoint_every}")
        if not 0 < self.epochs < math.inf or (self.max_steps is not None and self.max_steps < 1):
            raise ValueError("epochs must be greater than 0 and max_steps at least 1")
        seen = {path.resolve() for path in self.data.records}
        both = [str(path) for path in self.heldout.records if path.resolve() in seen]
        both += [pattern for pattern in self.heldout.shards if pattern in self.data.shards]
        if both:
            raise ValueError(f"heldout names what data trains on: {', '.join(both)}")
        if self.stage == "align" and self.lora.rank:
            raise ValueError("stage 'align' leaves the language model alone; lora.rank must be 0 there")
        if self.tower == "lora" and not self.lora.rank:
            raise ValueError("tower 'lora' needs lora.rank greater than 0")
        if self.tower == "frozen" and self.optim.tower_learning_rate is not None:
            raise ValueError("optim.tower_learning_rate is of no use while the tower is frozen")


def load_settings(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Read a YAML file, with ``key.sub=value`` on top.

    Raises:
        SettingsError: with everything that is wrong.
    """
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), refuse_twice(yaml.SafeLoader))
    except FileNotFoundError:
        raise SettingsError([f"there is no settings file {path}"]) from None
    except (yaml.YAMLError, SettingsError) as error:
        raise SettingsError([f"{path} is not valid YAML: {error}"]) from error
    return build_settings(TrainSettings, mapping, overrides, source=path, parse_value=yaml.safe_load)
