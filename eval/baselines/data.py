"""Questions and pictures for a comparison of towers, and the batches that all towers are trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from bootstrap.scenes.write import write_split
from eval.answers import InputError, read_json
from eval.baselines.config import ParetoSettings, SceneSettings
from eval.config import BenchmarkSettings
from eval.task import Example, Task, choose_answer
from eval.tasks import load_task
from llm_integration.generate import open_picture
from sparse_vlm.atomic import atomic_directory
from sparse_vlm.transform import ImageTransform

Turn = tuple[str, str]


@dataclass(frozen=True)
class Quiz:
    """Questions about pictures.

    Attributes:
        task: The benchmark with its scorer.
        examples: Questions with their answers.
        folder: Where the pictures are.
        descriptions: A request for a description and the description, by file name; empty where there are
            none.
    """

    task: Task
    examples: tuple[Example, ...]
    folder: Path
    descriptions: Mapping[str, Turn] = field(default_factory=dict)

    @property
    def pictures(self) -> list[str]:
        """File names, each once, in order of their first question."""
        return list(dict.fromkeys(str(example.image) for example in self.examples))


@dataclass(frozen=True)
class Plan:
    """Which pictures and questions come in which step; nothing in it depends on the tower.

    Attributes:
        rows: (steps, batch) numbers of pictures.
        turns: For each of them, its questions and answers in order.
        sha256: Of both.
    """

    rows: Tensor
    turns: list[list[list[Turn]]]
    sha256: str


def load_quizzes(settings: ParetoSettings) -> tuple[Quiz, Quiz]:
    """Training and test questions; scenes are made first where they are not there yet.

    Raises:
        InputError: If a file is missing, damaged or has no pictures.
    """
    if settings.scenes is None:
        assert settings.train_files is not None
        assert settings.test_files is not None
        train, test = load_quiz(settings.train_files), load_quiz(settings.test_files)
    else:
        folder = settings.out / "scenes"
        make_scenes(folder, settings.scenes)
        train, test = (load_quiz(_scene_files(folder / name)) for name in ("train", settings.scenes.split))
        if settings.scenes.descriptions:
            train = replace(train, descriptions=_load_descriptions(folder / "train" / "chat.json"))
    test = replace(test, examples=test.examples[: settings.limit])
    return without_pictures_of(train, test), test


def without_pictures_of(train: Quiz, test: Quiz) -> Quiz:
    """Training questions about other pictures than the test's: some benchmarks share them between splits.

    Raises:
        InputError: If none is left.
    """
    if train.folder.resolve() != test.folder.resolve():
        return train
    tested = set(test.pictures)
    kept = tuple(example for example in train.examples if str(example.image) not in tested)
    if not kept:
        raise InputError(
            f"Every training picture in {train.folder} is in the test too; ask fewer questions with limit=…."
        )
    return replace(train, examples=kept)


def make_scenes(folder: Path, settings: SceneSettings) -> None:
    """Writes both splits, as a whole or not at all."""
    if folder.is_dir():
        return
    with atomic_directory(folder) as making:
        for split, count in (("train", settings.train), (settings.split, settings.test)):
            write_split(making / split, split, count, settings.seed, settings.size)


def _scene_files(folder: Path) -> BenchmarkSettings:
    return BenchmarkSettings(
        "scenes", folder / "questions.json", folder / "annotations.json", folder / "images"
    )


def _load_descriptions(path: Path) -> dict[str, Turn]:
    """The first turn of each conversation, by picture."""
    turns = {record["image"]: record["conversations"] for record in read_json(path)}
    return {
        name: (said[0]["value"].replace("<image>", "").strip(), said[1]["value"])
        for name, said in turns.items()
    }


def load_quiz(files: BenchmarkSettings) -> Quiz:
    """Questions that have answers, and pictures.

    Raises:
        InputError: If a file is missing or damaged, no picture folder is named, or no question has both.
    """
    if files.images is None:
        raise InputError(f"{files.name}: name the folder of its pictures (images).")
    task = load_task(files.name)
    examples = task.load_examples(files.questions, files.annotations, files.images)
    if any(example.choices for example in examples):
        raise InputError(
            f"{files.name}: its answers are letters of options; a comparison of towers asks bare questions."
        )
    whole = tuple(example for example in examples if example.image is not None and example.answers)
    if not whole:
        raise InputError(
            f"{files.name}: none of {len(examples)} questions has both a picture and a gold answer; name the "
            "file of the answers (annotations), if there is one."
        )
    return Quiz(task, whole, files.images)


def load_pixels(
    quiz: Quiz, transform: ImageTransform, on_picture: Callable[[], object] = lambda: None
) -> Tensor:
    """All pictures of a quiz, (n, 3, H, W), in the order of :attr:`Quiz.pictures`.

    Args:
        quiz: Whose.
        transform: The teacher's.
        on_picture: Called after each.

    Raises:
        InputError: If a picture is missing or broken.
    """
    pixels = []
    for name in quiz.pictures:
        try:
            pixels.append(transform(open_picture(quiz.folder / name)))
        except ValueError as error:
            raise InputError(f"A picture of {quiz.task.name} cannot be used: {error}.") from None
        on_picture()
    return torch.stack(pixels)


def plan_batches(quiz: Quiz, steps: int, batch: int, turns: int, seed: int) -> Plan:
    """Every picture once before any comes again, each time with other questions in another order.

    A description, where there is one, stands anywhere among a picture's questions: had it always the first
    place, no question would ever follow the picture directly, as it does in the test.

    Args:
        quiz: Training questions.
        steps: Updates.
        batch: Pictures an update.
        turns: Questions a picture at most.
        seed: Of the order.
    """
    asked: dict[str, list[Turn]] = {}
    for example in quiz.examples:
        asked.setdefault(str(example.image), []).append((example.question, choose_answer(example.answers)))
    pictures = quiz.pictures
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += rng.sample(range(len(pictures)), len(pictures))
    rows = torch.tensor(order[: steps * batch]).view(steps, batch)

    def converse(name: str) -> list[Turn]:
        said = rng.sample(asked[name], min(turns, len(asked[name])))
        if name in quiz.descriptions:
            said.insert(rng.randint(0, len(said)), quiz.descriptions[name])
        return said

    chosen = [[converse(pictures[row]) for row in step] for step in rows.tolist()]
    digest = hashlib.sha256(repr((rows.tolist(), chosen)).encode()).hexdigest()
    return Plan(rows, chosen, digest)


def all_texts(quiz: Quiz) -> Sequence[str]:
    """Questions and answers, for a tokenizer of their words."""
    asked = [text for example in quiz.examples for text in (example.question, choose_answer(example.answers))]
    return [*asked, *(text for turn in quiz.descriptions.values() for text in turn)]
