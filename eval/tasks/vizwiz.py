"""VizWiz: photographs and spoken questions of blind people, many of which cannot be answered."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_json_or_lines
from eval.intervals import Figure
from eval.metrics.vqa import as_submitted, leave_one_out, normalise_evalai, vizwiz_accuracy
from eval.questions import bare_question, is_llava_file, need, required
from eval.shapes import each, fields, identifier, maybe, scalar, text
from eval.task import SHORT_ANSWER, Example, Judgement, Task, checked, score_figure

_MAY = {"answers": maybe(each(fields(answer=scalar))), "answer_type": text}
_ASKED = {"question_id": identifier, "image": text, "text": text}
_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_NUMBERED = re.compile(r"VizWiz_\w+_(\d{8})\.jpg")
_BOTH = "VQA normalisation of both sides (lmms-eval)"


class VizWiz(Task):
    """Soft accuracy under VizWiz's own scorer, and with the people's answers normalised too."""

    name = "vizwiz"
    scorer = "VizWiz official"
    primary = "accuracy"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        source = required(annotations or questions, "VizWiz's JSON (--annotations)")
        content = read_json_or_lines(source)
        if not isinstance(content, list):
            raise InputError(f"{source} is no VizWiz file: expected a list of questions with their picture.")
        if is_llava_file(content):
            rows_asked = [_from_llava(row, {}, source, number) for number, row in enumerate(content, start=1)]
            return checked(rows_asked, images, source)
        rows: dict[str, Any] = {}
        for number, row in enumerate(content, start=1):
            need(row, {"image": text, "question": text}, source, f"question {number}", _MAY)
            if row["image"] in rows:
                raise InputError(f"{source} asks about {row['image']} twice.")
            rows[row["image"]] = row
        asked = None
        if questions is not None and questions != source:
            asked = read_json_or_lines(questions)
        if asked is not None and questions is not None and is_llava_file(asked):
            for number, row in enumerate(asked, start=1):
                need(row, _ASKED, questions, f"row {number}")
            orphans = [row["image"] for row in asked if row["image"] not in rows]
            if orphans:
                raise InputError(
                    f"{len(orphans)} of {len(asked)} questions of {questions} are not in {source} "
                    f"({name_some(orphans)}); is it another split's file?"
                )
            examples = [
                _from_llava(row, rows[row["image"]], questions, number)
                for number, row in enumerate(asked, start=1)
            ]
        else:
            examples = [_example(row) for row in rows.values()]
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        # LLaVA's script puts raw text through the EvalAI processor before it becomes a submission.
        score, compared = vizwiz_accuracy(answer if as_written else normalise_evalai(answer), example.answers)
        plain = normalise_evalai(answer)
        both = leave_one_out([normalise_evalai(text) == plain for text in example.answers])
        return Judgement(example.key, score, compared, example.category, {"both": both})

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures = {
            "accuracy": score_figure(judgements, self.scorer),
            "accuracy_both_sides": score_figure(
                judgements, _BOTH, scores=[j.facts["both"] for j in judgements]
            ),
        }
        for name in sorted({j.category for j in judgements} - {""}):
            group = [j for j in judgements if j.category == name]
            figures[f"answer_type/{name}"] = score_figure(group, self.scorer)
        return figures

    def llava_prompt(self, example: Example) -> str:
        return example.question.capitalize() + _UNANSWERABLE + SHORT_ANSWER

    def lmms_prompt(self, example: Example) -> str:
        return example.question.capitalize() + _UNANSWERABLE + SHORT_ANSWER

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        rows = [
            {"image": e.image, "answer": as_submitted(e.key, answers, as_written)}
            for e in examples
            if e.key in answers
        ]
        return ".json", json.dumps(rows).encode()


def _example(row: dict[str, Any]) -> Example:
    image = row["image"]
    match = _NUMBERED.fullmatch(image)
    aliases = (image.removesuffix(".jpg"), *((str(int(match.group(1))),) if match else ()))
    return Example(
        key=image,
        question_id=image,
        question=row["question"],
        image=image,
        answers=tuple(str(person["answer"]) for person in row.get("answers") or ()),
        category=row.get("answer_type", ""),
        aliases=aliases,
    )


def _from_llava(asked: dict[str, Any], row: dict[str, Any], path: Path, number: int) -> Example:
    need(asked, _ASKED, path, f"row {number}")
    question = row.get("question", bare_question(asked["text"]).removesuffix(_UNANSWERABLE))
    base = _example({**row, "image": asked["image"], "question": question})
    return replace(
        base,
        question_id=asked["question_id"],
        llava_prompt=asked["text"],
        aliases=(str(asked["question_id"]), base.aliases[0]),
    )
