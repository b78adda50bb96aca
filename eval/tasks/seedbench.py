"""SEED-Bench: multiple choice in nine kinds of question about pictures (and three about videos)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eval.answers import InputError, name_some, read_json_or_lines
from eval.intervals import Figure
from eval.metrics.choices import read_first_letter
from eval.questions import is_llava_file, llava_questions, need, required, rows_of
from eval.shapes import by_name, count, identifier, maybe, scalar, text
from eval.task import OPTION_LETTER, Example, Judgement, Task, checked, score_figure

_LETTERS = "ABCD"
_ROW = {"question_id": identifier, "question": text, "answer": text, "data_type": text}
_MAY = {
    "question_type_id": count,
    **dict.fromkeys((f"choice_{letter.lower()}" for letter in _LETTERS), scalar),
}
_FIRST = "first letter (lmms-eval)"


class SeedBench(Task):
    """Accuracy over the picture questions; video questions are scored too where they were answered."""

    name = "seedbench"
    scorer = "letter alone (LLaVA)"
    primary = "image"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        source = required(annotations or questions, "SEED-Bench.json (--annotations)")
        content = read_json_or_lines(source)
        if not isinstance(content, dict) or "questions" not in content:
            raise InputError(f'{source} is no SEED-Bench file: expected {{"questions": […]}}.')
        need(content, {}, source, "the whole", {"question_type": by_name(count)})
        names = {number: name for name, number in content.get("question_type", {}).items()}
        examples = []
        for place, row in enumerate(rows_of(content, "questions", source), start=1):
            need(row, _ROW, source, f"question {place}", _MAY)
            kind = row.get("question_type_id")
            video = row["data_type"] != "image"
            if not video:
                need(row, {}, source, f"question {place}", {"data_id": maybe(text)})
            examples.append(
                Example(
                    key=str(row["question_id"]),
                    question_id=row["question_id"],
                    question=row["question"],
                    image=None if video else row.get("data_id"),
                    answers=(row["answer"],),
                    choices=tuple(str(row.get(f"choice_{letter.lower()}", "")) for letter in _LETTERS),
                    category=names.get(kind, str(kind)),
                    optional=video,
                    facts={"type": "video" if video else "image"},
                )
            )
        keys = _number_keys(example.key for example in examples)
        examples = [
            e if key == e.key else replace(e, key=key, twin=e.key)
            for e, key in zip(examples, keys, strict=True)
        ]
        if questions is not None and questions != source:
            examples = _with_prompts(examples, questions)
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        gold = example.answers[0]
        left_out = example.facts.get("left_out", 0)
        facts = {
            "type": example.facts["type"],
            "left_out": left_out,
            "first": float(read_first_letter(answer) == gold.upper()),
        }
        return Judgement(example.key, float(answer == gold), answer, example.category, facts)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures = {}
        for kind in ("image", "video"):
            group = [j for j in judgements if j.facts["type"] == kind]
            if group:
                left_out = group[0].facts["left_out"]
                short = f", {left_out} annotated ones not in the question file" if left_out else ""
                figures[kind] = score_figure(group, self.scorer + short)
                figures[f"{kind}_first_letter"] = score_figure(
                    group, _FIRST, scores=[j.facts["first"] for j in group]
                )
        if "image" in figures and "video" in figures:
            figures["all"] = score_figure(judgements, self.scorer)
        for name in sorted({j.category for j in judgements}):
            group = [j for j in judgements if j.category == name]
            figures[f"type/{name}"] = score_figure(group, self.scorer)
        return figures

    def units(self, judgements: Sequence[Judgement]) -> dict[str, float]:
        return {j.key: j.score for j in judgements if j.facts["type"] == "image"}

    def llava_prompt(self, example: Example) -> str:
        return self.lmms_prompt(example)

    def lmms_prompt(self, example: Example) -> str:
        options = "\n".join(f"{a}. {text}" for a, text in zip(_LETTERS, example.choices, strict=False))
        return f"{example.question}\n{options}{OPTION_LETTER}"

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        rows = (
            json.dumps({"question_id": e.question_id, "prediction": answers[e.key]})
            for e in examples
            if e.key in answers
        )
        return ".jsonl", "".join(f"{row}\n" for row in rows).encode()


def _number_keys(ids: Iterable[str]) -> list[str]:
    """A key for each question: its id, or "ID#2" if an earlier one has it (the official file: 49914)."""
    counts: Counter[str] = Counter()
    keys = []
    for name in ids:
        counts[name] += 1
        keys.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return keys


def _with_prompts(examples: list[Example], questions: Path) -> list[Example]:
    """The examples with LLaVA's prompts and pictures, where its question file is given."""
    content = read_json_or_lines(questions)
    if not is_llava_file(content):
        raise InputError(f"{questions} is not LLaVA's question file for SEED-Bench.")
    rows = llava_questions(content, questions)
    keys = _number_keys(str(row.question_id) for row in rows)
    asked = dict(zip(keys, rows, strict=True))
    annotated = {example.key for example in examples}
    orphans = [key for key in asked if key not in annotated]
    if orphans and len(orphans) < len(asked):
        raise InputError(
            f"{len(orphans)} of {len(asked)} questions of {questions} are not in the annotation file "
            f"({name_some(orphans)}); is it another release's?"
        )
    left_out = Counter(example.facts["type"] for example in examples if example.key not in asked)
    examples = [example for example in examples if example.key in asked]
    if not examples:
        raise InputError(f"None of the questions of {questions} is in the annotation file.")
    made = []
    for example in examples:
        row = asked[example.key]
        # LLaVA's names say the folder too (SEED-Bench-image/…). Of a video it shows one frame; we show none.
        kind = example.facts["type"]
        image = (row.image or example.image) if kind == "image" else None
        facts = {**example.facts, "left_out": left_out[kind]}
        made.append(replace(example, llava_prompt=row.llava_prompt, image=image, facts=facts))
    return made
