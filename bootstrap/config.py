"""The settings of a bootstrap run: frozen dataclasses that refuse what does not fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml

from sparse_vlm.settings import SettingsError, build_settings, refuse_twice

from .data.config import DataConfig
from .muon import has_muon

SettingsT = TypeVar("SettingsT")
Precision = Literal["fp32", "bf16"]
Engine = Literal["auto", "single", "ddp", "deepspeed"]


@dataclass(frozen=True)
class TeacherSettings:
    """Which ViT to bootstrap from.

    Attributes:
        name: see :func:`bootstrap.teacher.load_teacher`.
        weights: checkpoint file, where the name is an architecture.
        precision: of its arithmetic; it is never trained.
    """

    name: str
    weights: str | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty: name a teacher (docs/bootstrap.md lists the forms)")


@dataclass(frozen=True)
class StudentSettings:
    """The SparseFormer to make of it.

    Attributes:
        drop: first blocks of the ViT to replace by the focusing transformer; a third by default.
        tune: next blocks, inherited and trained; a third by default.
        freeze: last blocks, inherited and frozen; the rest by default.
        architecture: fields of :class:`sparse_vlm.SparseFormerConfig` to set, for instance ``num_latents``.
        token_counts: token counts (class token included) to train with, one drawn for each step; by default
            always the architecture's own. A count named twice is drawn twice as often.
        start_from: an encoder directory to start from instead of the teacher's weights.
        activation_checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the training step with ``torch.compile``.
    """

    drop: int | None = None
    tune: int | None = None
    freeze: int | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    token_counts: tuple[int, ...] = ()
    start_from: str | None = None
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.start_from is not None and self.architecture:
            raise ValueError(
                "start_from brings its own architecture: leave architecture out, or start from the teacher"
            )


# Settings of the objectives that weigh none of them.
_NO_WEIGHTS = ("regions", "warmup", "handover_end")


@dataclass(frozen=True)
class ObjectiveSettings:
    """Weights of the objectives (:mod:`bootstrap.objectives`), each mentioned where it is defined.

    Attributes:
        handover: hand-over tokens against mid-depth teacher tokens, pooled over a region per token.
        tokens: final tokens against final teacher tokens, pooled over the same regions.
        regions: ``"start"``: where each token's RoI began, so that together the tokens stand for the whole
            picture however their RoIs move; ``"now"``: where the token looked last. With ``"now"`` RoIs are
            free to leave for corners that are easy to describe, and they do (``docs/bootstrap.md``).
        pooled_cosine: pooled embedding, cosine.
        pooled: pooled embedding, squared distance in units of the teacher's spread.
        relations: similarities between the pictures of a batch.
        warmup: share of the steps at the beginning with the hand-over objective alone: the teacher stops
            after its first third, the cortex is not run.
        handover_end: the hand-over weight falls linearly to this share of itself at the end.
    """

    handover: float = 1.0
    tokens: float = 1.0
    regions: Literal["start", "now"] = "start"
    pooled_cosine: float = 0.0
    pooled: float = 1.0
    relations: float = 0.0
    warmup: float = 0.2
    handover_end: float = 0.1

    def __post_init__(self) -> None:
        for name, weight in {**self.weights, "handover_end": self.handover_end}.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {weight}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, 0 to 1, got {self.warmup}")
        if self.warmup > 0 and not self.handover:
            raise ValueError(
                "warmup trains on the hand-over objective alone: set handover above 0 or warmup to 0"
            )
        if self.warmup < 1 and not any(self.weights.values()):
            raise ValueError("all objectives have weight 0: nothing to learn")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of every objective, by its name."""
        names = (setting.name for setting in fields(self))
        return {name: getattr(self, name) for name in names if name not in _NO_WEIGHTS}


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, or Muon and AdamW, with a cosine schedule.

    Attributes:
        lr: peak learning rate of stem and focusing transformer.
        cortex_lr: peak learning rate of the tuned cortex blocks.
        muon_lr: peak learning rate of the matrices of the focusing transformer under Muon, AdamW taking the
            rest; the tuned blocks' matrices get it in the proportion of ``cortex_lr`` to ``lr``. 0 for AdamW
            alone. Needs PyTorch 2.9, and no DeepSpeed, whose ZeRO cuts matrices into pieces.
        warmup_steps: steps of linear warm-up.
        joint_lr: factor on every rate once the objective's warm-up (``objective.warmup``) is over: the high
            rates that suit the hand-over undo it where the cortex learns too.
        final_lr: share of the peak that the schedule ends at.
        weight_decay: on matrices only, never on RoIs, embeddings, norms and biases.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        clip_norm: gradients are scaled down to this norm.
        ema: decay of an exponential moving average of the weights, which is then what is evaluated and saved;
            0 for none.
    """

    lr: float = 1e-3
    cortex_lr: float = 3e-4
    muon_lr: float = 0.0
    warmup_steps: int = 100
    joint_lr: float = 1.0
    final_lr: float = 0.02
    weight_decay: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "cortex_lr", "muon_lr", "joint_lr", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is a share of the peak, 0 to 1, got {self.final_lr}")
        if self.muon_lr > 0 and self.lr == 0:
            raise ValueError("muon_lr above 0 needs lr above 0: other parameters learn by it")
        if self.muon_lr > 0 and not has_muon():
            raise ValueError(
                f"muon_lr needs Muon of PyTorch 2.9 or later, this is {torch.__version__}: set muon_lr to 0"
            )
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {self.clip_norm}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class TargetSettings:
    """Where teacher targets come from.

    Attributes:
        store: a folder to keep them in, so that each picture and view passes the teacher once; by default
            the teacher looks at every batch anew. Needs ``data.views``.
        max_gigabytes: refuse to start a store that would grow larger.
    """

    store: str | None = None
    max_gigabytes: float = 200.0

    def __post_init__(self) -> None:
        if not self.max_gigabytes > 0:
            raise ValueError(f"max_gigabytes must be above 0, got {self.max_gigabytes}")


@dataclass(frozen=True)
class HeldoutSettings:
    """Held-out pictures, never trained on.

    Attributes:
        source: folder, tars or dataset, as in ``data.source``, that shares no picture with it; None for no
            evaluation.
        kind: as ``data.kind``.
        split: as ``data.split``.
        column: as ``data.column``.
        truth: how to know the right class: ``"none"``, ``"index_prefix"`` (file names begin with the class
            index and an underscore), ``"folders"`` (a folder for each class, numbered in the order of their
            names, as ImageNet's validation pictures usually lie), or a JSON file from each picture's file
            name, or its path below the folder, to its class index (perhaps under the key ``labels``).
        classes: JSON file with ``classes`` and ``templates`` for zero-shot classification by a teacher
            with a text side.
        limit: at most so many pictures, evenly spaced in the order of their paths.
        batch_size: pictures at once.
        every: evaluate every so many steps; 0 for only at the end.
        tokens: token counts (class token included) to report too, at every evaluation.
    """

    source: str | None = None
    kind: Literal["auto", "folder", "tars", "hf"] = "auto"
    split: str | None = None
    column: str | None = None
    truth: str = "none"
    classes: str | None = None
    limit: int = 1000
    batch_size: int = 50
    every: int = 0
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.limit < 1 or self.batch_size < 1 or self.every < 0:
            raise ValueError("limit and batch_size must be at least 1, every at least 0")
        described = (self.truth != "none", self.classes, self.every, self.tokens, self.split, self.column)
        if self.source is None and any(described):
            raise ValueError(
                "truth, classes, every, tokens, split and column describe held-out pictures: name "
                "their source"
            )


@dataclass(frozen=True)
class BootstrapConfig:
    """One bootstrap run.

    Attributes:
        out: run directory: resolved configuration, log, checkpoints, and the encoder directory ``encoder``.
        teacher: the ViT.
        student: the SparseFormer.
        data: the unlabelled pictures.
        steps: optimiser steps.
        batch_size: pictures of one process in one forward pass.
        accumulate: forward passes per step.
        objective: weights of the objectives.
        optimiser: learning rates and their schedule.
        targets: where teacher targets come from.
        heldout: evaluation.
        precision: ``"bf16"`` runs the student under autocast; weights and RoIs stay fp32.
        engine: ``"auto"`` is ``"ddp"`` under torchrun and ``"single"`` otherwise.
        deepspeed: DeepSpeed JSON for ``engine: deepspeed``.
        device: ``"auto"`` takes a GPU if there is one.
        seed: of weights and token counts; ``data.seed`` is that of order and views.
        log_every: write a log line every so many steps.
        save_every: write a checkpoint every so many steps too, from before the evaluation of that step; there
            is always one at the end, from before the last evaluation.
        keep_checkpoints: delete older ones.
        figure: a photograph for the RoI picture; by default the first held-out picture.
    """

    out: str
    teacher: TeacherSettings
    data: DataConfig
    steps: int
    student: StudentSettings = field(default_factory=StudentSettings)
    batch_size: int = 32
    accumulate: int = 1
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    targets: TargetSettings = field(default_factory=TargetSettings)
    heldout: HeldoutSettings = field(default_factory=HeldoutSettings)
    precision: Precision = "fp32"
    engine: Engine = "auto"
    deepspeed: str | None = None
    device: str = "auto"
    seed: int = 0
    log_every: int = 20
    save_every: int = 0
    keep_checkpoints: int = 2
    figure: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.out:
            raise ValueError("out is empty: name a run directory")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be 0 or more and less than 2**63, got {self.seed}")
        if self.save_every < 0:
            raise ValueError(f"save_every must be 0 or more, got {self.save_every}")
        if self.objective.relations > 0 and self.batch_size < 2:
            raise ValueError(
                "objective.relations compares the pictures of a batch with each other: set batch_size to 2 "
                "or more, or relations to 0"
            )
        if self.figure is not None and self.heldout.source is None:
            raise ValueError(
                "figure is drawn when held-out pictures are evaluated: name heldout.source, or leave it out"
            )
        if (self.engine == "deepspeed") != (self.deepspeed is not None):
            raise ValueError("engine=deepspeed and deepspeed=FILE.json go together: set both or neither")
        if self.deepspeed is not None and self.optimiser.muon_lr:
            raise ValueError(
                "optimiser.muon_lr needs whole matrices, and DeepSpeed's ZeRO cuts them into pieces: set it "
                "to 0, or use torchrun with engine=ddp"
            )
        if self.targets.store is not None and not self.data.views:
            raise ValueError(
                "targets.store keeps one target per picture and view, so the number of views must be finite: "
                "set data.views to 1 or more, or targets.store to null"
            )


def read_config(path: str | Path, overrides: tuple[str, ...] = ()) -> BootstrapConfig:
    """Read a YAML file and put ``key.sub=value`` overrides on top.

    Raises:
        ValueError: naming file, key and remedy.
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no configuration file {path}; see configs/bootstrap/ for those that come with it"
        )
    return read_settings(BootstrapConfig, path, overrides)


def read_settings(kind: type[SettingsT], path: Path, overrides: Sequence[str] = ()) -> SettingsT:
    """Settings of any kind from a YAML file, with ``key.sub=value`` on top.

    Raises:
        ValueError: naming file, key and remedy.
        OSError: if the file cannot be read.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), refuse_twice(yaml.SafeLoader))
    except (UnicodeDecodeError, yaml.YAMLError, SettingsError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    return build_settings(kind, values, overrides, source=path, parse_value=yaml.safe_load)
