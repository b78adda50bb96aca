"""TextVQA 0.5.1: questions about the writing in a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.answers import AnswerRecord, InputError, name_some, read_json_or_lines
from eval.intervals import Figure
from eval.metrics.vqa import as_submitted, textvqa_accuracy
from eval.questions import is_llava_file, need, required
from eval.shapes import each, identifier, maybe, text
from eval.task import SHORT_ANSWER, Example, Judgement, Task, checked, score_figure

_ROW = {"question_id": identifier, "image_id": identifier, "question": text}
_MAY = {"answers": maybe(each(text)), "ocr_tokens": maybe(each(text))}
_OCR_LINE = "Reference OCR token: "
_FEW_SHOT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_in_prompt(prompt: str) -> str | None:
    """The question within a prompt of LLaVA's scripts, lower case; None if it is not one of theirs."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = _FEW_SHOT.search(prompt)
        return match.group(1).lower() if match else None
    if _OCR_LINE in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR_LINE.strip()) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    return None


class TextVqa(Task):
    """Soft accuracy with the EvalAI answer processor."""

    name = "textvqa"
    scorer = "TextVQA official (mmf)"
    primary = "accuracy"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        source = required(annotations or questions, "TextVQA's JSON with the answers (--annotations)")
        content = read_json_or_lines(source)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise InputError(f'{source} is no TextVQA file: expected {{"data": […]}}.')
        examples = [_example(row, number, source) for number, row in enumerate(content["data"], start=1)]
        if questions is not None and questions != source:
            asked = read_json_or_lines(questions)
            if is_llava_file(asked):
                examples = _as_asked(examples, asked, questions, source)
            elif not isinstance(asked, dict) or "data" not in asked:
                raise InputError(
                    f"{questions} is neither a TextVQA JSON nor LLaVA's question file for TextVQA."
                )
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        score, compared = textvqa_accuracy(answer, example.answers)
        return Judgement(example.key, score, compared)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        return {"accuracy": score_figure(judgements, self.scorer)}

    def record_keys(self, record: AnswerRecord) -> tuple[str, ...]:
        question = question_in_prompt(record.prompt) if record.prompt else None
        plain = (str(record.question_id),)
        return plain if question is None else (f"{record.question_id}\n{question}", *plain)

    def llava_prompt(self, example: Example) -> str:
        tokens = example.facts["ocr_tokens"]
        if tokens is None:
            raise InputError(
                "LLaVA's TextVQA prompt lists the picture's OCR tokens, which neither file holds; give "
                "llava_textvqa_val_v051_ocr.jsonl as the question file."
            )
        return f"{example.question.capitalize()}\n{_OCR_LINE}{', '.join(tokens)}{SHORT_ANSWER}"

    def lmms_prompt(self, example: Example) -> str:
        return example.question.capitalize() + SHORT_ANSWER

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        rows = [
            {"question_id": e.question_id, "answer": as_submitted(e.key, answers, as_written)}
            for e in examples
            if e.key in answers
        ]
        return ".json", json.dumps(rows).encode()


def _example(row: Any, number: int, path: Path) -> Example:
    need(row, _ROW, path, f"question {number}", _MAY)
    people = row.get("answers") or []
    if people and len(people) != 10:
        raise InputError(f"Question {row['question_id']} of {path} has {len(people)} answers and not 10.")
    return Example(
        key=str(row["question_id"]),
        question_id=row["question_id"],
        question=row["question"],
        image=f"{row['image_id']}.jpg",
        answers=tuple(people),
        aliases=(f"{row['image_id']}\n{row['question'].lower()}",),
        facts={"ocr_tokens": row.get("ocr_tokens")},
    )


def _as_asked(
    examples: list[Example], asked: list[dict[str, Any]], questions: Path, source: Path
) -> list[Example]:
    """The examples that LLaVA's question file asks, in its order and with its prompts."""
    by_alias = {example.aliases[0]: example for example in examples}
    made, orphans = [], []
    for number, row in enumerate(asked, start=1):
        need(row, {"question_id": identifier, "text": text}, questions, f"row {number}")
        example = by_alias.get(f"{row['question_id']}\n{question_in_prompt(row['text'])}")
        if example is None:
            orphans.append(row["question_id"])
        else:
            made.append(replace(example, llava_prompt=row["text"]))
    if orphans:
        raise InputError(
            f"{len(orphans)} of {len(asked)} questions of {questions} are not in {source} "
            f"({name_some(orphans)}); is it another split's file?"
        )
    return made
