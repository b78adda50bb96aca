"""MME: two yes-or-no questions a picture, fourteen subtasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.answers import AnswerRecord, InputError, name_some, read_json_or_lines, read_text
from eval.intervals import (
    RESAMPLES,
    SEED,
    Figure,
    accuracy_figure,
    add_intervals,
    alike_interval,
    is_point,
    percentile_interval,
)
from eval.metrics.yes_no import read_mme
from eval.questions import LLAVA_ROW, bare_question, is_llava_file, need, required
from eval.shapes import identifier, text
from eval.task import SHORT_ANSWER, Example, Judgement, Task, checked, score_figure

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_YES_OR_NO = "Please answer yes or no."
_POINTS = np.array([0.0, 50.0, 200.0])  # of a picture with none, one and both of its answers right
_STRAYS = 0.1  # share of questions that the answers' copy of the benchmark may lack


def make_key(category: str, picture: str, question: str) -> str:
    """LLaVA's file drops the folder and "Please answer yes or no."; so does the key."""
    stem = picture.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
    for instruction in (SHORT_ANSWER.strip(), _YES_OR_NO):
        question = question.replace(instruction, "")
    return f"{category}/{stem}\n{' '.join(question.split())}"


class Mme(Task):
    """Accuracy and accuracy+ a subtask; perception and cognition are sums of both over their subtasks."""

    name = "mme"
    scorer = "MME official"
    primary = "perception"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        source = required(annotations or questions, "MME's folder or JSON with the answers (--annotations)")
        rows = _load_folder(source) if source.is_dir() else _load_json(source)
        examples = [_example(*row, source) for row in rows]
        if questions is not None and questions != source:
            examples = _with_prompts(examples, questions, source)
        per_picture: dict[str, int] = {}
        for example in examples:
            if example.answers:
                per_picture[example.facts["pair"]] = per_picture.get(example.facts["pair"], 0) + 1
        odd = [pair for pair, count in per_picture.items() if count != 2]
        if odd:
            raise InputError(
                f"{len(odd)} pictures of {source} do not have two questions each ({name_some(odd)}); "
                "MME's accuracy+ needs pairs."
            )
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        said = read_mme(answer)
        score = float(said == example.answers[0])
        return Judgement(example.key, score, said, example.category, {"pair": example.facts["pair"]})

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures: dict[str, Figure] = {}
        subtasks: dict[str, Figure] = {}
        for category in dict.fromkeys((*PERCEPTION, *COGNITION, *sorted({j.category for j in judgements}))):
            group = [j for j in judgements if j.category == category]
            if not group:
                continue
            pairs: dict[str, list[float]] = {}
            for judgement in group:
                pairs.setdefault(judgement.facts["pair"], []).append(judgement.score)
            whole = [sum(scores) for scores in pairs.values() if len(scores) == 2]
            accuracy = score_figure(group, self.scorer, detail=True)
            figures[f"{category}/accuracy"] = accuracy
            if not whole:
                continue
            plus = accuracy_figure([float(right == 2) for right in whole], self.scorer, detail=True)
            figures[f"{category}/accuracy_plus"] = plus
            points = accuracy.value + plus.value
            interval = _interval(whole, len(subtasks))
            subtasks[category] = Figure(points, len(group), *interval, "points", self.scorer)
            figures[category] = subtasks[category]
        for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
            there = [subtasks[c] for c in members if c in subtasks]
            if there:
                low, high = add_intervals([(part.value, part.low, part.high) for part in there])
                value = sum(part.value for part in there)
                n = sum(part.n for part in there)
                protocol = self.scorer
                if len(there) < len(members):
                    protocol += f", {len(there)} of {len(members)} subtasks"
                figures[name] = Figure(value, n, low, high, "subtasks' intervals", "points", protocol)
        return figures

    def record_keys(self, record: AnswerRecord) -> tuple[str, ...]:
        category, _, picture = str(record.question_id).partition("/")
        # Our own answers name the question by its key: two questions share an id.
        return (str(record.question_id), make_key(category, picture, record.prompt or ""))

    def llava_prompt(self, example: Example) -> str:
        return example.question.replace(_YES_OR_NO, "").strip() + SHORT_ANSWER

    def lmms_prompt(self, example: Example) -> str:
        return example.question.strip().replace(f" {_YES_OR_NO}", "") + SHORT_ANSWER


def _interval(right_of_two: Sequence[float], stream: int) -> tuple[float, float, str]:
    """Interval and method of a subtask's points.

    Args:
        right_of_two: How many of each picture's two answers are right.
        stream: The subtask's number: subtasks are independent of each other.
    """
    counts = np.array([sum(right == k for right in right_of_two) for k in (0, 1, 2)])
    n = int(counts.sum())
    rng = np.random.default_rng([SEED, stream])
    draws = rng.multinomial(n, counts / n, size=RESAMPLES)
    low, high = percentile_interval(draws @ _POINTS / n)
    if is_point(low, high):  # all pictures are alike, those of a model that always says "yes" for instance
        low, high = alike_interval(float(counts @ _POINTS) / n, n, _POINTS[0], _POINTS[2])
        return low, high, "wilson over pictures"
    return low, high, "bootstrap over pictures"


def _load_folder(folder: Path) -> list[tuple[str, str, str, str]]:
    """(category, picture, question, gold) from MME's release folder or from its eval_tool's result folder."""
    rows = []
    flat = sorted(folder.glob("*.txt"))
    for file in flat:
        for number, line in enumerate(_lines(file), start=1):
            cells = line.split("\t")
            if len(cells) not in (3, 4):
                raise InputError(
                    f"Line {number} of {file} has {len(cells)} columns and not picture, question, answer."
                )
            rows.append((file.stem, cells[0], cells[1], cells[2]))
    for category in [] if flat else sorted(p for p in folder.iterdir() if p.is_dir()):
        inner = category / "questions_answers_YN"
        for file in sorted((inner if inner.is_dir() else category).glob("*.txt")):
            for number, line in enumerate(_lines(file), start=1):
                cells = line.strip().split("\t")
                if len(cells) != 2:
                    raise InputError(f"Line {number} of {file} is not a question, a tab and an answer.")
                rows.append((category.name, _picture(category, file), cells[0], cells[1]))
    if not rows:
        raise InputError(f"{folder} holds no MME text files.")
    return rows


def _lines(file: Path) -> list[str]:
    return [line for line in read_text(file).replace("\r\n", "\n").split("\n") if line.strip()]


def _picture(category: Path, questions: Path) -> str:
    for folder in ("images/", ""):
        for suffix in (".jpg", ".png"):
            name = f"{folder}{questions.stem}{suffix}"
            if (category / name).is_file():
                return name
    return f"{questions.stem}.jpg"


def _load_json(path: Path) -> list[tuple[str, str, str, str]]:
    content = read_json_or_lines(path)
    if not isinstance(content, list):
        raise InputError(f"{path} is no list of records with category, image_path, question and answer.")
    rows = []
    for number, row in enumerate(content, start=1):
        need(row, dict.fromkeys(("category", "question", "answer"), text), path, f"record {number}")
        picture = next((row[name] for name in ("image_path", "image", "question_id") if name in row), None)
        if not isinstance(picture, str):
            raise InputError(f'Record {number} of {path} lacks "image_path".')
        rows.append((row["category"], picture, row["question"], row["answer"]))
    return rows


def _example(category: str, picture: str, question: str, gold: str, path: Path) -> Example:
    answer = gold.strip().lower().rstrip(".")
    if answer not in ("yes", "no"):
        raise InputError(f'{path}: the answer to "{question}" must be Yes or No, and is {gold!r}.')
    key = make_key(category, picture, question)
    return Example(
        key=key,
        question_id=f"{category}/{picture.rsplit('/', 1)[-1]}",
        question=question,
        image=picture if picture.startswith(f"{category}/") else f"{category}/{picture}",
        answers=(answer,),
        category=category,
        facts={"pair": key.split("\n")[0]},
    )


def _with_prompts(examples: list[Example], questions: Path, source: Path) -> list[Example]:
    """The examples that LLaVA's question file asks, in its order.

    Copies of MME differ by a few pictures. As in LLaVA's conversion for MME's scorer, questions without a
    gold answer are left out of the figures; they stay among the examples, to be counted and named.
    """
    content: Any = read_json_or_lines(questions)
    if not is_llava_file(content):
        raise InputError(f"{questions} is not LLaVA's question file for MME.")
    by_key = {example.key: example for example in examples}
    made, orphans = [], []
    for number, row in enumerate(content, start=1):
        need(row, {"question_id": identifier, "text": text}, questions, f"row {number}", LLAVA_ROW)
        category, _, picture = str(row["question_id"]).partition("/")
        key = make_key(category, picture, row["text"])
        example = by_key.get(key)
        if example is None:
            orphans.append(row["question_id"])
            example = Example(
                key, row["question_id"], bare_question(row["text"]), None, category=category, optional=True
            )
        image = row.get("image", example.image)
        made.append(replace(example, llava_prompt=row["text"], image=image))
    if len(orphans) > _STRAYS * len(content):
        raise InputError(
            f"{len(orphans)} of {len(content)} questions of {questions} are not in {source} "
            f"({name_some(orphans)}); is it another benchmark's file?"
        )
    return made
