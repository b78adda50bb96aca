"""VQA v2: open questions about COCO photographs, ten people's answers each."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_json_or_lines
from eval.intervals import Figure
from eval.metrics.vqa import as_submitted, normalise_evalai, vqa_accuracy
from eval.questions import Question, coco_picture, load_vqa_questions, need, required, rows_of
from eval.shapes import each, fields, identifier, maybe, scalar, text
from eval.task import Example, Judgement, Task, checked, score_figure

_PEOPLE = each(fields({"answer_id": maybe(identifier)}, answer=scalar))
_MAY = {"answer_type": text, "question_type": text, "image_id": maybe(identifier)}


class VqaV2(Task):
    """Soft accuracy with the official normalisation, overall and by answer type."""

    name = "vqav2"
    scorer = "VQA v2 official"
    primary = "accuracy"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads the question file and the annotations; the latter alone are enough for scoring."""
        path = required(questions or annotations, "The question file (--questions)")
        content = read_json_or_lines(path)
        gold: dict[int | str, dict[str, Any]] | None = None
        if isinstance(content, dict) and "annotations" in content and "questions" not in content:
            if annotations not in (None, path):
                raise InputError(f"{path} is an annotation file; give the question file as --questions.")
            annotations = path
            rows = _annotated(content, path)
        else:
            rows = load_vqa_questions(path, content)
        if annotations is not None:
            subset = content.get("data_subtype") if isinstance(content, dict) else None
            gold = _load_annotations(annotations, subset, path)
            orphans = [row.question_id for row in rows if row.question_id not in gold]
            if orphans:
                raise InputError(
                    f"{len(orphans)} of {len(rows)} questions of {path} have no annotation in {annotations} "
                    f"({name_some(orphans)}); is it another split's file?"
                )
        examples = []
        for row in rows:
            entry = gold[row.question_id] if gold else {"answers": []}
            examples.append(
                Example(
                    key=str(row.question_id),
                    question_id=row.question_id,
                    question=row.text,
                    image=row.image,
                    answers=tuple(str(person["answer"]) for person in entry["answers"]),
                    category=entry.get("answer_type", ""),
                    llava_prompt=row.llava_prompt,
                    facts={"people": entry["answers"], "question_type": entry.get("question_type", "")},
                )
            )
        return checked(examples, images, path)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        # LLaVA's script puts raw text through the EvalAI processor before it becomes a submission.
        submitted = answer if as_written else normalise_evalai(answer)
        score, compared = vqa_accuracy(submitted, example.facts["people"])
        facts = {"question_type": example.facts["question_type"]}
        return Judgement(example.key, score, compared, example.category, facts)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures = {"accuracy": score_figure(judgements, self.scorer)}
        for name in sorted({j.category for j in judgements} - {""}):
            group = [j for j in judgements if j.category == name]
            figures[f"answer_type/{name}"] = score_figure(group, self.scorer)
        by_question: dict[str, list[Judgement]] = {}
        for judgement in judgements:
            by_question.setdefault(judgement.facts["question_type"], []).append(judgement)
        for name in sorted(by_question.keys() - {""}):
            figures[f"question_type/{name}"] = score_figure(by_question[name], self.scorer, detail=True)
        return figures

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        # The server takes whole sets only: test-dev's answers within a file of all of test2015.
        rows = [
            {"question_id": e.question_id, "answer": as_submitted(e.key, answers, as_written)}
            for e in examples
        ]
        return ".json", json.dumps(rows).encode()


def _annotated(content: dict[str, Any], path: Path) -> list[Question]:
    """The questions that an annotation file knows by number only."""
    subset = str(content.get("data_subtype", ""))
    rows = rows_of(content, "annotations", path)
    for number, row in enumerate(rows, start=1):
        may = {"image_id": maybe(identifier)}
        need(row, {"question_id": identifier}, path, f"annotation {number}", may)
    return [Question(row["question_id"], "", coco_picture(row.get("image_id"), subset)) for row in rows]


def _load_annotations(path: Path, subset: str | None, questions: Path) -> dict[int | str, dict[str, Any]]:
    content = read_json_or_lines(path)
    if not isinstance(content, dict) or "annotations" not in content:
        raise InputError(f'{path} is no VQA v2 annotation file: expected {{"annotations": […]}}.')
    own = content.get("data_subtype")
    if subset is not None and own is not None and subset != own:
        raise InputError(f"{questions} holds the questions of {subset}, and {path} the answers of {own}.")
    made: dict[int | str, dict[str, Any]] = {}
    for number, row in enumerate(rows_of(content, "annotations", path), start=1):
        need(row, {"question_id": identifier, "answers": _PEOPLE}, path, f"annotation {number}", _MAY)
        if not row["answers"]:
            raise InputError(f"Annotation {number} of {path} has no answers.")
        if row["question_id"] in made:
            raise InputError(f"{path} annotates question {row['question_id']} twice.")
        made[row["question_id"]] = row
    return made
