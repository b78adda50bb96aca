"""GQA: compositional questions about Visual Genome photographs."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_json_or_lines
from eval.intervals import Figure
from eval.questions import Question, is_llava_file, llava_questions, need, required
from eval.shapes import fields, identifier, maybe, text
from eval.task import Example, Judgement, Task, checked, score_figure

_MAY = {"question_id": identifier, "id": identifier, "imageId": identifier}
_TYPES = maybe(fields(dict.fromkeys(("structural", "semantic"), maybe(text))))


def convert(text: str) -> str:
    """LLaVA's conversion of raw text to a GQA prediction."""
    return text.rstrip(".").lower()


class Gqa(Task):
    """Exact match over the balanced questions, overall and by question type."""

    name = "gqa"
    scorer = "GQA official"
    primary = "accuracy"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        path = required(questions or annotations, "The question file (--questions)")
        content = read_json_or_lines(path, distinct_keys=True)
        asked: list[Question] | None = None
        if is_llava_file(content):
            asked = llava_questions(content, path)
            source = required(annotations, "GQA's question JSON with the answers (--annotations)")
        else:
            source = annotations or path
        gold = content if source == path else read_json_or_lines(source, distinct_keys=True)
        if isinstance(gold, list):
            gold = _by_id(gold, source)
        if not isinstance(gold, dict) or not all(isinstance(row, dict) for row in gold.values()):
            raise InputError(
                f"{source} is no GQA question file: expected an object of questions by their id."
            )
        if asked is None:
            rows = _by_id(content, path, source == path) if isinstance(content, list) else content
            if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
                raise InputError(
                    f"{path} is no GQA question file: expected an object of questions by their id."
                )
            asked = [_question(key, row, path) for key, row in rows.items() if row.get("isBalanced", True)]
        orphans = [row.question_id for row in asked if str(row.question_id) not in gold]
        if orphans:
            raise InputError(
                f"{len(orphans)} of {len(asked)} questions of {path} are not in {source} "
                f"({name_some(orphans)}); is it another split's file?"
            )
        return checked([_example(row, gold[str(row.question_id)], source) for row in asked], images, path)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        prediction = answer if as_written else convert(answer)
        score = float(prediction == example.answers[0])
        facts = {name: example.facts[name] for name in ("structural", "semantic")}
        return Judgement(example.key, score, prediction, example.category, facts)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures = {"accuracy": score_figure(judgements, self.scorer)}
        for name in sorted({j.category for j in judgements} - {""}):
            group = [j for j in judgements if j.category == name]
            figures[name] = score_figure(group, self.scorer)
        for kind in ("structural", "semantic"):
            for name in sorted({j.facts[kind] for j in judgements} - {""}):
                group = [j for j in judgements if j.facts[kind] == name]
                figures[f"{kind}/{name}"] = score_figure(group, self.scorer, detail=True)
        return figures

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        rows = [
            {
                "questionId": e.question_id,
                "prediction": answers[e.key] if e.key in as_written else convert(answers[e.key]),
            }
            for e in examples
            if e.key in answers
        ]
        return ".json", json.dumps(rows).encode()


def _by_id(rows: list[Any], path: Path, answered: bool = True) -> dict[str, Any]:
    """The same questions as a list of records, as the Hugging Face copies have them."""
    wanted = {"question": text, **({"answer": text} if answered else {})}
    made: dict[str, Any] = {}
    for number, row in enumerate(rows, start=1):
        need(row, wanted, path, f"record {number}", _MAY)
        key = str(row["question_id"] if "question_id" in row else row.get("id", ""))
        if not key or key in made:
            raise InputError(f"Record {number} of {path} has no id of its own.")
        made[key] = row
    return made


def _question(key: str, row: dict[str, Any], path: Path) -> Question:
    need(row, {"question": text}, path, f"question {key}", {"imageId": identifier})
    if "imageId" not in row:  # copies that list records name the file
        if "image" not in row:
            raise InputError(f'Question {key} of {path} lacks "image".')
        return Question(key, row["question"], row["image"] if isinstance(row["image"], str) else None)
    return Question(key, row["question"], f"{row['imageId']}.jpg")


def _example(row: Question, gold: dict[str, Any], source: Path) -> Example:
    need(gold, {"answer": text}, source, f"question {row.question_id}", {"types": _TYPES})
    types = gold.get("types") or {}
    structural = types.get("structural") or ""
    return Example(
        key=str(row.question_id),
        question_id=str(row.question_id),
        question=row.text,
        image=row.image,
        answers=(gold["answer"],),
        category=("open" if structural == "query" else "binary") if structural else "",
        llava_prompt=row.llava_prompt,
        facts={"structural": structural, "semantic": types.get("semantic") or ""},
    )
