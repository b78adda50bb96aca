"""Questions to look at: drawn by lot among those that both models, one of them or none got right."""

from __future__ import annotations

import filecmp
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from eval.answers import InputError, read_text
from eval.config import FILES, WEIGHTS, RunSettings
from eval.engine import ANSWERS, Ask, build_asks
from eval.intervals import SEED
from eval.reports.inputs import CONFIG, Source
from eval.shapes import MisfitError, fields, maybe, text
from eval.task import Example, Task
from eval.tasks import load_task
from llm_integration.generate import open_picture
from sparse_vlm.settings import SettingsError, build_settings


@dataclass(frozen=True)
class Given:
    """One model's answer.

    Attributes:
        source: Number of its run.
        text: The answer as it was decoded.
        score: Under the benchmark's rule, 0 ... 1; None where there is no gold answer.
    """

    source: int
    text: str
    score: float | None


@dataclass(frozen=True)
class Shown:
    """One question with everything that is shown of it.

    Attributes:
        key: The question's.
        question: In words.
        choices: Options, if there are any.
        gold: Gold answers, the most frequent first, each once.
        image: File name of the picture, if there is one.
        picture: The photograph.
        answers: Of all models.
    """

    key: str
    question: str
    choices: tuple[str, ...]
    gold: tuple[str, ...]
    image: str | None
    picture: Image.Image | None
    answers: tuple[Given, ...]


@dataclass(frozen=True)
class Group:
    """Questions that went alike.

    Attributes:
        name: What happened, in words.
        of: How many there are.
        shown: Some of them.
    """

    name: str
    of: int
    shown: tuple[Shown, ...]


def choose_examples(sources: Sequence[Source], count: int, seed: int = SEED) -> list[Group]:
    """Draws questions of one benchmark.

    Args:
        sources: Its runs, one or several; the groups are made by the first two.
        count: Questions a group, at most.
        seed: Of the lot.

    Raises:
        InputError: If questions, gold answers or pictures of the runs are not where they were, or are others.
    """
    first = sources[0]
    settings = load_settings_of(first)
    try:
        task = load_task(settings.task.name)
        examples = task.load_examples(settings.task.questions, settings.task.annotations)[: settings.limit]
        asks = build_asks(task, examples, settings.protocol, "none", settings.seed)
    except InputError as error:
        raise InputError(f"The examples of {first.path} cannot be shown: {error} {_HINT}") from None
    asked = {ask.example.key: ask for ask in asks}
    folders = {source.number: load_settings_of(source).task.images for source in sources}
    shown_from = settings.task.images
    answers = {s.number: _read_answers(s, asked, folders[s.number], shown_from) for s in sources}
    groups: dict[str, list[Example]] = {}
    scores: dict[str, tuple[float | None, ...]] = {}
    for example in examples:
        if all(example.key in given for given in answers.values()):
            scores[example.key] = tuple(_score(task, example, answers[s.number]) for s in sources)
            groups.setdefault(_name(scores[example.key], sources), []).append(example)
    made = []
    for name in _names(sources):
        members = groups.get(name, [])
        drawn = draw_lots(members, count, seed)
        for source in sources:
            for image in (example.image for example in drawn):
                if not _is_same(image, folders[source.number], image, shown_from):
                    raise InputError(
                        f"{source.path} was asked about {image} of {folders[source.number]}, which is "
                        f"another picture than that of {shown_from}; --examples 0 shows none."
                    )
        shown = tuple(
            Shown(
                key=example.key,
                question=example.question,
                choices=example.choices,
                gold=_by_frequency(example.answers),
                image=example.image,
                picture=_open(settings, example, first),
                answers=tuple(
                    Given(source.number, answers[source.number][example.key], score)
                    for source, score in zip(sources, scores[example.key], strict=True)
                ),
            )
            for example in drawn
        )
        if shown:
            made.append(Group(name, len(members), shown))
    return made


_HINT = "Make the report in the folder that the run was made in, or pass --examples 0."


def load_settings_of(source: Source) -> RunSettings:
    """The settings a run was made with.

    Raises:
        InputError: If they are not those of a run.
    """
    path = source.path / CONFIG
    try:
        written = json.loads(read_text(path))
        if isinstance(written, dict):
            for known in (WEIGHTS, FILES):
                written.pop(known, None)
        made = build_settings(RunSettings, written, source=path)
    except (SettingsError, json.JSONDecodeError) as error:
        raise InputError(f"{path} holds no settings of eval.run: {' '.join(str(error).split())}") from None
    return made


def _read_answers(
    source: Source, asks: Mapping[str, Ask], folder: Path | None, shown_from: Path | None
) -> dict[str, str]:
    """A run's answers by key.

    Args:
        source: The run.
        asks: What is asked now, by key.
        folder: Where the run found its pictures.
        shown_from: Where those that are shown are.

    Raises:
        InputError: If an answer is to another question or about another picture.
    """
    path = source.path / ANSWERS
    answered = fields({"prompt": text, "image": maybe(text)}, key=text, text=text)
    answers = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line:
            try:
                row = json.loads(line)
                answered(row, "")
            except (json.JSONDecodeError, MisfitError) as error:
                raise InputError(f"Line {number} of {path} is no answer of eval.run: {error}.") from None
            if row["key"] in asks:
                now = asks[row["key"]]
                prompt, image = row.get("prompt", now.prompt), row.get("image", now.image)
                if prompt != now.prompt:
                    raise InputError(
                        f"Line {number} of {path} answers {prompt!r}, and the question of that key is now "
                        f"{now.prompt!r}; --examples 0 shows none."
                    )
                if image != now.image and not _is_same(image, folder, now.image, shown_from):
                    raise InputError(
                        f"Line {number} of {path} was asked {_about(image)}, and the question of that key is "
                        f"now {_about(now.image)}; --examples 0 shows none."
                    )
            answers[row["key"]] = row["text"]
    return answers


def _about(image: str | None) -> str:
    return "without a picture" if image is None else f"about {image}"


def _is_same(asked: str | None, folder: Path | None, shown: str | None, shown_from: Path | None) -> bool:
    """Whether the picture that a run was asked about is the one that is shown: the same file, or a copy.

    Where one of them is not there any more, their names decide.
    """
    if asked is not None and shown is not None and folder is not None and shown_from is not None:
        there, here = folder / asked, shown_from / shown
        if there.is_file() and here.is_file():
            return there.samefile(here) or filecmp.cmp(there, here, shallow=False)
    return asked == shown


def _score(task: Task, example: Example, answers: Mapping[str, str]) -> float | None:
    return task.judge(example, answers[example.key]).score if example.answers else None


def _names(sources: Sequence[Source]) -> list[str]:
    if len(sources) == 1:
        return ["right", "wrong", "not judged"]
    return ["both right", *(f"only {s.label} right" for s in sources[:2]), "both wrong", "not judged"]


def _name(scores: Sequence[float | None], sources: Sequence[Source]) -> str:
    """The group; a soft score counts as right from one half on."""
    right = [None if score is None else score >= 0.5 for score in scores[:2]]
    names = _names(sources)
    if None in right:
        return names[-1]
    if len(right) == 1:
        return names[0 if right[0] else 1]
    return names[{(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}[right[0], right[1]]]  # type: ignore[index]


def draw_lots(examples: Sequence[Example], count: int, seed: int = SEED) -> list[Example]:
    """Some of the examples, by lot; of other pictures where there are enough."""
    lot = list(examples)
    random.Random(seed).shuffle(lot)
    seen: set[str | None] = set()
    first: list[Example] = []
    rest: list[Example] = []
    for example in lot:
        (rest if example.image in seen else first).append(example)
        seen.add(example.image)
    return [*first, *rest][:count]


def _by_frequency(answers: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(dict.fromkeys(answers), key=lambda answer: -list(answers).count(answer)))


def _open(settings: RunSettings, example: Example, source: Source) -> Image.Image | None:
    if example.image is None:
        return None
    folder: Any = settings.task.images
    if folder is None:
        raise InputError(f"{source.path / CONFIG} names no folder of pictures as task.images. {_HINT}")
    try:
        return open_picture(Path(folder) / example.image)
    except ValueError as error:
        raise InputError(f"A picture of {source.path} cannot be shown: {error}. {_HINT}") from None
