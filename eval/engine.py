"""Asks a model every question once: in batches, in several processes, and on after a kill."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from eval.answers import LONG_ANSWER, InputError, Matched, has_foreign_letters, name_some, read_text
from eval.model import Answer
from eval.task import Example, Task
from llm_integration.generate import open_picture
from sparse_vlm.atomic import write_atomic
from sparse_vlm.lines import append_lines, cut_unfinished, read_lines

ANSWERS = "answers.jsonl"
SKIPPED = "skipped.jsonl"
_PARTS = "answers.part-*.jsonl"


class Model(Protocol):
    """What the engine needs of a model."""

    def answer(self, prompts: Sequence[str], pictures: Sequence[Image.Image | None]) -> list[Answer]:
        """One answer for each prompt."""


@dataclass(frozen=True)
class Ask:
    """One question as the model gets it.

    Attributes:
        example: The question.
        prompt: The text.
        image: Picture file below the picture folder; None for a question without a picture.
    """

    example: Example
    prompt: str
    image: str | None


def build_asks(task: Task, examples: Sequence[Example], protocol: str, floor: str, seed: int) -> list[Ask]:
    """Prompts and pictures of all questions; those that may go unanswered and have no picture are not asked.

    Args:
        task: The benchmark.
        examples: Its questions.
        protocol: The prompt's.
        floor: "none", "no-image" or "random-picture".
        seed: Of the pictures' exchange.
    """
    examples = [e for e in examples if e.image is not None or not e.optional]  # SEED-Bench's videos
    images: list[str | None] = [example.image for example in examples]
    if floor == "no-image":
        images = [None] * len(examples)
    elif floor == "random-picture":
        images = exchange_pictures(images, seed)
    return [Ask(e, task.prompt(e, protocol), i) for e, i in zip(examples, images, strict=True)]


def exchange_pictures(images: Sequence[str | None], seed: int) -> list[str | None]:
    """Gives every question the picture of another one, never its own.

    The different pictures are put in a random ring, and each question gets its picture's successor.

    Raises:
        InputError: If there are fewer than two different pictures.
    """
    ring = list(dict.fromkeys(image for image in images if image is not None))
    if len(ring) < 2:
        raise InputError("The floor 'random-picture' needs questions about at least two pictures.")
    random.Random(seed).shuffle(ring)
    after = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
    return [None if image is None else after[image] for image in images]


class AnswerStore:
    """A run's answers on disk: one line an answer, a file a process, one file in the end.

    A process that is killed leaves at most one line that is not whole; it is cut off and asked again.

    Args:
        folder: The run's folder.
        rank: This process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / _PARTS.replace("*", f"{rank:04d}")

    @property
    def finished(self) -> bool:
        """Whether every question has been asked."""
        return (self.folder / ANSWERS).is_file()

    def repair(self) -> int:
        """Cuts lines that are not whole off the ends of all files; returns how many. For one process.

        Where :meth:`finish` was killed at its very end, the parts that it left go.
        """
        if self.finished:
            self._remove_parts()
        return sum(cut_unfinished(path) for path in self.folder.glob(_PARTS))

    def read(self) -> list[dict[str, Any]]:
        """All whole lines of all processes; one that another process is just writing is not there yet."""
        try:
            return [row for path in sorted(self.folder.glob(_PARTS)) for row in read_lines(path)]
        except ValueError as error:
            raise InputError(str(error)) from None

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds lines to this process's file."""
        append_lines(self.path, rows)

    def finish(self, asks: Sequence[Ask]) -> None:
        """Makes one file of all, in the order of the questions. For one process.

        Raises:
            InputError: If a question has two answers or none.
        """
        rows = self.read()
        by_key = {row["key"]: row for row in rows}
        holes = [ask.example.key for ask in asks if ask.example.key not in by_key]
        if len(by_key) != len(rows) or holes:
            raise InputError(
                f"The answers in {self.folder} have {len(rows) - len(by_key)} duplicates and {len(holes)} "
                f"holes ({name_some(holes)}); was the folder shared with another run?"
            )
        ordered = [by_key[ask.example.key] for ask in asks]
        for name, wanted in ((SKIPPED, True), (ANSWERS, False)):  # the answers last: they end the run
            lines = [json.dumps(r, ensure_ascii=False) for r in ordered if ("skipped" in r) is wanted]
            if lines or name == ANSWERS:
                write_atomic(self.folder / name, "".join(f"{line}\n" for line in lines))
        self._remove_parts()

    def _remove_parts(self) -> None:
        for path in self.folder.glob(_PARTS):
            path.unlink()


def ask_all(
    model: Model,
    model_id: str,
    asks: Sequence[Ask],
    images: Path | None,
    store: AnswerStore,
    batch: int,
    max_bad_pictures: int = 0,
    shard: tuple[int, int] = (0, 1),
    show: bool = True,
) -> None:
    """Asks the questions that have no answer yet.

    Args:
        model: The model.
        model_id: Its name, for the answer file.
        asks: All questions of the run.
        images: Picture folder.
        store: Where answers go.
        batch: Questions at once.
        max_bad_pictures: So many pictures may be missing or broken, in this process.
        shard: This process and the number of processes.
        show: Whether to show progress.

    Raises:
        InputError: If too many pictures are bad.
    """
    rank, world = shard
    known = store.read()
    _check_prompts(known, asks, store.folder)
    done = {row["key"] for row in known}
    shared = _shared_ids(asks)
    mine = asks[rank::world]  # by place, not by what is left: other processes are writing already
    own = {ask.example.key for ask in mine}
    bad = {row["image"]: row["skipped"] for row in known if "skipped" in row and row["key"] in own}
    skipped = sum("skipped" in row for row in known if row["key"] in own)
    todo = [ask for ask in mine if ask.example.key not in done]
    with tqdm(
        total=len(mine), initial=len(mine) - len(todo), unit="question", disable=None if show else True
    ) as bar:
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            rows: list[dict[str, Any]] = []
            good: list[tuple[Ask, Image.Image | None]] = []
            for ask in part:
                try:
                    good.append((ask, load_picture(images, ask)))
                except ValueError as error:
                    bad[ask.image] = str(error)
                    skipped += 1
                    if len(bad) > max_bad_pictures:
                        raise InputError(
                            f"{len(bad)} pictures cannot be used ({name_some(list(bad.values()), 3)}); "
                            f"max_bad_pictures={max_bad_pictures} are allowed."
                        ) from None
                    rows.append({"key": ask.example.key, "image": ask.image, "skipped": str(error)})
            answers = model.answer([ask.prompt for ask, _ in good], [p for _, p in good]) if good else []
            for (ask, _), answer in zip(good, answers, strict=True):
                example = ask.example
                rows.append(
                    {
                        "question_id": example.key if shared else example.question_id,
                        "key": example.key,
                        "image": ask.image,
                        "prompt": ask.prompt,
                        "text": answer.text,
                        "model_id": model_id,
                        "visual_tokens": answer.visual_tokens,
                        "new_tokens": answer.new_tokens,
                        **({"too_long": True} if answer.too_long else {}),
                    }
                )
            store.write(rows)
            bar.update(len(part))
            if skipped:
                bar.set_postfix(skipped=skipped)


def _check_prompts(rows: Sequence[Mapping[str, Any]], asks: Sequence[Ask], folder: Path) -> None:
    """Sees that stored answers are to these very questions and pictures: the file may have been edited.

    Raises:
        InputError: If one is not.
    """
    by_key = {ask.example.key: ask for ask in asks}
    for row in rows:
        ask = by_key.get(row["key"])
        if ask is None:
            continue
        for asked, now in (
            (row.get("prompt", ask.prompt), ask.prompt),
            (row.get("image", ask.image), ask.image),
        ):
            if asked != now:
                raise InputError(
                    f"{folder} holds an answer to {asked!r}, where question {row['key']} is now {now!r}; "
                    "name another folder with out=…."
                )


def _shared_ids(asks: Sequence[Ask]) -> bool:
    """Whether a question id stands for several questions, so that only the key tells them apart."""
    return len({ask.example.question_id for ask in asks}) < len(asks)


def load_picture(images: Path | None, ask: Ask) -> Image.Image | None:
    """The picture of a question.

    Raises:
        ValueError: If it is missing or broken.
    """
    if ask.image is None:
        return None
    if images is None:
        raise ValueError(f"{ask.image} is needed, and task.images names no folder")
    return open_picture(images / ask.image)


def match_own(asks: Sequence[Ask], folder: Path) -> Matched:
    """A finished run's answers, by key: the engine knows which question each of them is to."""
    lines = list(_read_lines(folder / ANSWERS))
    _check_prompts(lines, asks, folder)
    rows = {row["key"]: row["text"] for row in lines}
    answers = {ask.example.key: rows[ask.example.key] for ask in asks if ask.example.key in rows}
    return Matched(
        answers=answers,
        missing=tuple(a.example.key for a in asks if a.example.key not in rows and not a.example.optional),
        empty=tuple(key for key, text in answers.items() if not text.strip()),
        long=tuple(key for key, text in answers.items() if len(text) > LONG_ANSWER),
        foreign=tuple(key for key, text in answers.items() if has_foreign_letters(text)),
    )


def count_visual_tokens(folder: Path) -> float:
    """Mean number of image tokens a question, over a finished run."""
    counts = [row["visual_tokens"] for row in _read_lines(folder / ANSWERS)]
    return sum(counts) / max(1, len(counts))


def count_too_long(folder: Path) -> int:
    """Questions of a finished run whose prompt alone filled all positions of the language model."""
    return sum("too_long" in row for row in _read_lines(folder / ANSWERS))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in read_text(path).split("\n"):
        if line:
            yield json.loads(line)
