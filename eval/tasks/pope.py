"""POPE: is this object in the picture? Three ways of choosing the absent objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.answers import AnswerRecord, InputError, read_json_or_lines
from eval.intervals import Figure
from eval.metrics.yes_no import binary_figures, mean_figures, read_exact, read_pope_llava
from eval.questions import Question, is_llava_file, llava_questions, need, required
from eval.shapes import identifier, maybe, text
from eval.task import Example, Judgement, Task, checked

CATEGORIES = ("random", "popular", "adversarial")
_MAY = {"image": maybe(text), "question_id": identifier}
_RULES = {"llava": "LLaVA's rule", "strict": "exact word (lmms-eval)"}


class Pope(Task):
    """Accuracy, precision, recall, F1 and yes-ratio a category, under LLaVA's rule and the strict one."""

    name = "pope"
    scorer = "POPE official"
    primary = "llava/mean/f1"
    empty_reads = '"yes" under LLaVA\'s rule, and neither under the strict one'

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        source = required(annotations or questions, "POPE's label file or folder (--annotations)")
        labels = _load_labels(source)
        asked: list[Question] | None = None
        if questions is not None and questions != source:
            content = read_json_or_lines(questions)
            asked = llava_questions(content, questions) if is_llava_file(content) else None
            if asked is None and not _is_label_file(content):
                raise InputError(f"{questions} is neither LLaVA's POPE question file nor a POPE label file.")
        examples = []
        for category, rows in labels.items():
            own = None if asked is None else [q for q in asked if q.category in (category, "")]
            if own is not None and len(own) != len(rows):
                raise InputError(
                    f"{questions} asks {len(own)} {category} questions, and {source} labels {len(rows)}."
                )
            for place, row in enumerate(rows):
                question = own[place] if own else None
                if question is not None and _differs(question, row):
                    raise InputError(
                        f"{category.capitalize()} question {place + 1} of {questions} and of {source} are "
                        "not the same; the two files are of different versions."
                    )
                examples.append(_example(row, category, place, question, len(labels) == 1))
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        gold = example.answers[0]
        said = {"llava": read_pope_llava(answer), "strict": read_exact(answer)}
        score = float(said["llava"] == gold)
        facts = {"gold": gold, "image": example.image or example.key, **said}
        return Judgement(example.key, score, said["llava"], example.category, facts)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        groups = {c: [j for j in judgements if j.category == c] for c in _in_order(judgements)}
        figures = {}
        for rule, label in _RULES.items():
            forgiving = rule == "strict"
            rows = [[(j.facts["image"], j.facts["gold"], j.facts[rule]) for j in g] for g in groups.values()]
            for category, group in zip(groups, rows, strict=True):
                part = binary_figures([(gold, said) for _, gold, said in group], label, forgiving)
                figures.update({f"{rule}/{category}/{name}": figure for name, figure in part.items()})
            part = mean_figures(rows, label, forgiving)
            figures.update({f"{rule}/mean/{name}": figure for name, figure in part.items()})
        return figures

    def record_keys(self, record: AnswerRecord) -> tuple[str, ...]:
        if record.question_id is None:
            return (f"#{record.position}\n{record.prompt or ''}",)
        return (str(record.question_id),)


def _load_labels(source: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of every label file, by category."""
    files = sorted(source.glob("coco_pope_*.json*")) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{source} holds no coco_pope_….json label files.")
    labels = {}
    for file in files:
        category = file.name.split(".")[0].removeprefix("coco_pope_")
        rows = read_json_or_lines(file)
        if not _is_label_file(rows):
            raise InputError(
                f'{file} is no POPE label file: expected lines with "text", "image" and "label".'
            )
        for number, row in enumerate(rows, start=1):
            need(row, {"text": text, "label": text}, file, f"line {number}", _MAY)
            if row["label"].lower() not in ("yes", "no"):
                raise InputError(f'Line {number} of {file}: the label must be "yes" or "no".')
        labels[category] = rows
    return {c: labels[c] for c in sorted(labels, key=_rank)}


def _is_label_file(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and isinstance(content[0], dict)
        and {"text", "label"} <= content[0].keys()
    )


def _differs(question: Question, row: dict[str, Any]) -> bool:
    same_picture = question.image is None or "image" not in row or question.image == row["image"]
    return not same_picture or question.text.strip() != row["text"].strip()


def _example(
    row: dict[str, Any], category: str, place: int, question: Question | None, alone: bool
) -> Example:
    own_id = row.get("question_id", place + 1)
    key = f"{category}/{own_id}"
    aliases: tuple[str, ...] = ()
    if question is not None:
        key = str(question.question_id)
    else:
        aliases = (str(own_id),)
    if alone:
        # Answers in POPE's own format have no ids: they follow the label file's order.
        aliases = (*aliases, f"#{place}\n", f"#{place}\n{row['text']}")
    return Example(
        key=key,
        question_id=question.question_id if question else own_id,
        question=row["text"],
        image=row.get("image"),
        answers=(str(row["label"]).lower(),),
        category=category,
        llava_prompt=question.llava_prompt if question else None,
        aliases=aliases,
    )


def _rank(category: str) -> tuple[int, str]:
    return (CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES), category)


def _in_order(judgements: Sequence[Judgement]) -> list[str]:
    return sorted({j.category for j in judgements}, key=_rank)
