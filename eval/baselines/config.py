"""Settings of a comparison of towers, as frozen dataclasses that refuse what makes no sense."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eval.config import BenchmarkSettings, read_settings
from eval.towers import METHODS


@dataclass(frozen=True)
class SceneSettings:
    """Generated scenes, made below the run's folder.

    Attributes:
        train: Training pictures.
        test: Pictures asked about.
        split: "heldout": the main object is of a pair that training never shows; "valid": new scenes of seen
            pairs.
        descriptions: Train on a description of each picture too, among its questions.
        size: Side of the pictures in pixels, at least 32.
        seed: Of the scenes.
    """

    train: int = 2000
    test: int = 100
    split: Literal["heldout", "valid"] = "heldout"
    descriptions: bool = True
    size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train < 1 or self.test < 1 or self.size < 32:
            raise ValueError("train and test must be at least 1, and size at least 32")


@dataclass(frozen=True)
class LlamaSettings:
    """The language model that every tower gets a fresh copy of.

    Attributes:
        directory: A Llama-type model with its tokenizer; None makes a small one with random weights and a
            tokenizer of the training questions' words.
        width: Of the random one.
        depth: Its blocks.
        heads: Its attention heads.
        mlp_width: Of its MLPs.
        vocabulary: Words it knows at most.
    """

    directory: Path | None = None
    width: int = 128
    depth: int = 3
    heads: int = 4
    mlp_width: int = 256
    vocabulary: int = 2000

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.mlp_width, self.vocabulary) < 1:
            raise ValueError("width, depth, heads, mlp_width and vocabulary must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, and {self.heads} does not divide {self.width}")


@dataclass(frozen=True)
class TrainSettings:
    """Training of projector and language model, and of what a tower trains; the same for all.

    Attributes:
        steps: Updates of each point.
        common_steps: Updates before that, over all towers in turn, each equally often; every point starts
            from their result. 0 for none.
        batch: Pictures an update.
        turns: Questions a picture at most, in one sequence.
        lr: Peak learning rate.
        projector_lr: That of the projector and of what a tower trains, where it is to be another: both begin
            at random, the language model does not. None: `lr`.
        warmup: Steps until the peak; a cosine to zero follows.
        weight_decay: On matrices.
        train_language: False trains the projector alone (and what a tower trains).
        seeds: One training of every point with each: of the order of pictures and questions, of the draws of
            random patches, and of every weight that starts at random.
    """

    steps: int = 200
    common_steps: int = 0
    batch: int = 16
    turns: int = 6
    lr: float = 2e-3
    projector_lr: float | None = None
    warmup: int = 20
    weight_decay: float = 0.01
    train_language: bool = True
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.turns) < 1:
            raise ValueError("steps, batch and turns must be at least 1")
        if self.common_steps < 0:
            raise ValueError("common_steps must be 0 or more")
        for name in ("lr", "projector_lr", "weight_decay", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of 0 or more, and is {value}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be one number or several different ones")


@dataclass(frozen=True)
class ParetoSettings:
    """One comparison.

    Attributes:
        out: The run's folder.
        teacher: As `bootstrap.teacher.load_teacher` takes it.
        teacher_weights: Its checkpoint, where the name is an architecture.
        encoder: An encoder directory bootstrapped from this teacher, for the method "sparseformer".
        scenes: Generated scenes; leave out `train_files` and `test_files` then.
        train_files: A benchmark's training questions and pictures.
        test_files: Its test questions and pictures.
        methods: Of `eval.towers.METHODS`; "vit" is added once, with all its patches.
        tokens: N for each of the others.
        language: The language model.
        training: The training.
        limit: Only the first so many test questions.
        max_new_tokens: Longest answer.
        floors: The figures of a model that was trained without pictures, and of the full ViT with the wrong
            picture.
        timing_rounds: Measurements of milliseconds, of each point in turn.
        threads: Of torch.
    """

    out: Path
    teacher: str
    teacher_weights: Path | None = None
    encoder: Path | None = None
    scenes: SceneSettings | None = None
    train_files: BenchmarkSettings | None = None
    test_files: BenchmarkSettings | None = None
    methods: tuple[str, ...] = METHODS
    tokens: tuple[int, ...] = (16, 36, 49, 64, 100, 196)
    language: LlamaSettings = field(default_factory=LlamaSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    limit: int | None = None
    max_new_tokens: int = 6
    floors: bool = True
    timing_rounds: int = 15
    threads: int = 1

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"methods must be some of {', '.join(METHODS)}; unknown: {', '.join(unknown)}")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError("tokens must be numbers of at least 1")
        for key, values in (("methods", self.methods), ("tokens", self.tokens)):
            twice = [str(value) for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"{key} must be different ones, and {', '.join(twice)} comes more than once")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, and is {self.limit}")
        if "sparseformer" in self.methods and self.encoder is None:
            raise ValueError("the method sparseformer needs an encoder directory: set encoder")
        given = self.train_files is not None and self.test_files is not None
        if (self.scenes is None) != given or (self.train_files is None) != (self.test_files is None):
            raise ValueError("set either scenes, or both train_files and test_files")
        if self.max_new_tokens < 1 or self.timing_rounds < 1 or self.threads < 1:
            raise ValueError("max_new_tokens, timing_rounds and threads must be at least 1")


def load_settings(path: Path, overrides: Sequence[str] = ()) -> ParetoSettings:
    """Reads a YAML file, with `key.sub=value` on top.

    Raises:
        InputError: With everything that is wrong.
    """
    return read_settings(ParetoSettings, path, overrides)
