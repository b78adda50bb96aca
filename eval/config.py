"""Settings of an evaluation run, as frozen dataclasses that refuse what makes no sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from eval.answers import InputError
from eval.task import LLAVA
from sparse_vlm.settings import SettingsError, build_settings, refuse_twice

SettingsT = TypeVar("SettingsT")
WEIGHTS = "weights_sha256"
"""Beside a run's settings in its folder: a model may be trained again in place."""
FILES = "model_files"
"""As well: it may get another configuration, processor, tokenizer or template."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """The benchmark and its files, as they are distributed.

    Attributes:
        name: One of `eval.tasks.list_tasks`.
        questions: Question file, official or LLaVA's.
        annotations: File or folder with the gold answers.
        images: Picture folder.
    """

    name: str
    questions: Path | None = None
    annotations: Path | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        if self.questions is None and self.annotations is None:
            raise ValueError("name the benchmark's files: questions, annotations or both")


@dataclass(frozen=True)
class RunSettings:
    """One run of one model over one benchmark.

    Attributes:
        model: A LLaVA directory, or the result of instruction tuning.
        task: See `BenchmarkSettings`.
        out: The run's folder.
        protocol: "llava-1.5" or "lmms-eval": the prompt around the question. "bare" is the question alone,
            for models tuned on the conversations of scenes.
        floor: "none"; "no-image" asks without the picture, "random-picture" with another question's picture.
            What a model reaches there, it does not owe to its eyes.
        batch: Questions a step of one process.
        max_new_tokens: Longest answer.
        limit: Only the first so many questions.
        max_bad_pictures: So many pictures may be missing or broken; their questions are left out of the
            figures, counted and named. One more ends the run.
        precision: "checkpoint" keeps the stored one.
        device: "auto" takes the GPU of this process where there is one.
        seed: Of the pictures' exchange under "random-picture".
    """

    model: Path
    task: BenchmarkSettings
    out: Path
    protocol: str = LLAVA
    floor: Literal["none", "no-image", "random-picture"] = "none"
    batch: int = 16
    max_new_tokens: int = 16
    limit: int | None = None
    max_bad_pictures: int = 0
    precision: Literal["checkpoint", "fp32", "bf16", "fp16"] = "checkpoint"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_new_tokens < 1:
            raise ValueError("batch and max_new_tokens must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")
        if self.max_bad_pictures < 0:
            raise ValueError("max_bad_pictures must be at least 0")


def load_settings(path: Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Settings of one run from a YAML file, with `key.sub=value` on top.

    Raises:
        InputError: With everything that is wrong.
    """
    return read_settings(RunSettings, path, overrides)


def read_settings(kind: type[SettingsT], path: Path, overrides: Sequence[str] = ()) -> SettingsT:
    """Settings of any kind from a YAML file, with `key.sub=value` on top.

    Raises:
        InputError: With everything that is wrong.
    """
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), refuse_twice(yaml.SafeLoader))
    except FileNotFoundError:
        raise InputError(f"The settings file {path} does not exist.") from None
    except OSError as error:
        raise InputError(f"The settings file {path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"The settings file {path} is not UTF-8 text (byte {error.start}).") from None
    except (yaml.YAMLError, SettingsError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    try:
        return build_settings(kind, mapping, overrides, source=path, parse_value=yaml.safe_load)
    except SettingsError as error:
        raise InputError(str(error)) from None
