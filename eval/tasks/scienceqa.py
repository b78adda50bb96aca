"""ScienceQA: school questions with options, half of them with a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_json_or_lines
from eval.intervals import Figure
from eval.metrics.choices import LETTERS, read_scienceqa
from eval.questions import need, required
from eval.shapes import count, each, fields, identifier, maybe, text
from eval.task import OPTION_LETTER, Example, Judgement, Task, checked, score_figure

_SPLIT = "test"
_PROBLEM = {"question": text, "choices": each(text, 1), "answer": count}
_MAY = {"image": maybe(text), "subject": text, "hint": text}
_ASKED = {"id": identifier, "conversations": each(fields(value=text), 2)}
_MAY_SHOW = {"image": maybe(text)}


class ScienceQa(Task):
    """Accuracy over all test questions and over those with a picture (IMG)."""

    name = "scienceqa"
    scorer = "LLaVA's ScienceQA rule"
    primary = "img_accuracy"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads `problems.json` and `pid_splits.json` (file or folder), and/or LLaVA's question JSON."""
        asked: list[Any] | None = None
        problems: dict[str, Any] | None = None
        split: list[str] | None = None
        source = required(annotations or questions, "ScienceQA's problems.json or folder (--annotations)")
        listed = source  # the file of LLaVA's rows, as `source` is that of the problems
        for path in dict.fromkeys(p for p in (annotations, questions) if p is not None):
            content, beside = _load(path)
            if isinstance(content, dict):
                problems, split, source = content, beside, path
            else:
                asked, listed = content, path
        if asked is not None:
            examples = [_from_llava(row, number, listed) for number, row in enumerate(asked, start=1)]
            if problems is not None:
                orphans = [e.key for e in examples if e.key not in problems]
                if orphans:
                    raise InputError(
                        f"{len(orphans)} questions of {listed} are not among the problems of {source} "
                        f"({name_some(orphans)})."
                    )
                examples = [
                    replace(_from_problem(e.key, problems[e.key], source), llava_prompt=e.llava_prompt)
                    for e in examples
                ]
        else:
            if problems is None or split is None:
                raise InputError(
                    f"No pid_splits.json beside {source}; give a folder with both, or LLaVA's question file."
                )
            orphans = [key for key in split if key not in problems]
            if orphans:
                raise InputError(f"{len(orphans)} test questions are not in {source} ({name_some(orphans)}).")
            examples = [_from_problem(key, problems[key], source) for key in split]
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        letter = read_scienceqa(answer, len(example.choices))
        score = float(letter == example.answers[0])
        return Judgement(example.key, score, letter, example.category, {"img": example.image is not None})

    def units(self, judgements: Sequence[Judgement]) -> dict[str, float]:
        with_picture = [judgement for judgement in judgements if judgement.facts["img"]]
        return super().units(with_picture or judgements)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures = {"accuracy": score_figure(judgements, self.scorer)}
        with_picture = [j for j in judgements if j.facts["img"]]
        if with_picture:
            figures["img_accuracy"] = score_figure(with_picture, self.scorer)
        for name in sorted({j.category for j in judgements} - {""}):
            group = [j for j in judgements if j.category == name]
            figures[f"subject/{name}"] = score_figure(group, self.scorer, detail=True)
        return figures

    def llava_prompt(self, example: Example) -> str:
        return self.lmms_prompt(example)

    def lmms_prompt(self, example: Example) -> str:
        context = f"Context: {example.facts['hint']}\n" if example.facts["hint"] else ""
        options = "\n".join(f"{a}. {text}" for a, text in zip(LETTERS, example.choices, strict=False))
        return f"{context}{example.question}\n{options}{OPTION_LETTER}"


def _load(path: Path) -> tuple[Any, list[str] | None]:
    """LLaVA's list, or the problems and the ids of the test split."""
    file = path / "problems.json" if path.is_dir() else path
    content = read_json_or_lines(file, distinct_keys=True)
    if isinstance(content, list):
        return content, None
    if not isinstance(content, dict):
        raise InputError(f"{file} is neither ScienceQA's problems.json nor LLaVA's question file.")
    if _SPLIT in content and isinstance(content[_SPLIT], list):
        raise InputError(f"{file} is pid_splits.json; give problems.json or the folder with both.")
    splits = file.with_name("pid_splits.json")
    if not splits.is_file():
        return content, None
    listed = read_json_or_lines(splits)
    if not isinstance(listed, dict) or _SPLIT not in listed:
        raise InputError(f'{splits} has no list of "{_SPLIT}" questions.')
    return content, listed[_SPLIT]


def _from_problem(key: str, row: Any, path: Path) -> Example:
    need(row, _PROBLEM, path, f"problem {key}", _MAY)
    if not row["answer"] < len(row["choices"]) <= len(LETTERS):
        raise InputError(f"Problem {key} of {path}: the answer {row['answer']} is none of its choices.")
    return Example(
        key=key,
        question_id=key,
        question=row["question"],
        image=f"{key}/{row['image']}" if row.get("image") else None,
        answers=(LETTERS[row["answer"]],),
        choices=tuple(row["choices"]),
        category=row.get("subject", ""),
        facts={"hint": row.get("hint", "")},
    )


def _from_llava(row: Any, number: int, path: Path) -> Example:
    """A row of `llava_test_CQM-A.json`: the question with its options, and the gold letter as the reply."""
    need(row, _ASKED, path, f"question {number}", _MAY_SHOW)
    asked = row["conversations"][0]["value"].replace("<image>", "").strip()
    starts: list[int] = []
    for letter in LETTERS:
        # Options are the last lines; the last mark of each letter is where it begins.
        found = [mark.start() for mark in re.finditer(rf"^{letter}\. ", asked, re.MULTILINE)]
        found = [start for start in found if not starts or start > starts[-1]]
        if not found:
            break
        starts.append(found[-1] if letter == "A" else found[0])
    if not starts:
        raise InputError(f'Question {row["id"]} of {path} has no options "A. …".')
    ends = [*starts[1:], len(asked) + 1]
    choices = tuple(asked[start + 3 : end - 1] for start, end in zip(starts, ends, strict=True))
    gold = row["conversations"][1]["value"]
    if gold not in LETTERS[: len(choices)]:
        raise InputError(f"Question {row['id']} of {path}: the reply {gold!r} is none of its letters.")
    return Example(
        key=str(row["id"]),
        question_id=row["id"],
        question=asked[: starts[0] - 1],
        image=row.get("image"),
        answers=(gold,),
        choices=choices,
        llava_prompt=asked + OPTION_LETTER,
        facts={"hint": ""},
    )
