"""DAQUAR: questions about indoor photographs, answered with a word or a list of words."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from eval.answers import InputError, read_text
from eval.intervals import Figure
from eval.questions import required
from eval.task import BARE, LLAVA, Example, Judgement, Task, checked, score_figure


def answer_set(text: str) -> frozenset[str]:
    """The words of a comma-separated answer: lower case, spaces for underscores, no final period."""
    parts = (part.replace("_", " ").strip().rstrip(".").strip() for part in text.lower().split(","))
    return frozenset(part for part in parts if part)


class Daquar(Task):
    """Exact match of the set of answer words."""

    name = "daquar"
    scorer = "exact answer set"
    primary = "accuracy"
    prompts = (LLAVA, BARE)

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads `data_eval.csv` (question, answer, image_id); question ids are row numbers from 0."""
        source = required(annotations or questions, "DAQUAR's CSV (--questions)")
        reader = csv.DictReader(io.StringIO(read_text(source), newline=""))
        if not {"question", "answer", "image_id"} <= set(reader.fieldnames or ()):
            raise InputError(f"{source} is no DAQUAR file: expected columns question, answer, image_id.")
        examples = []
        for number, row in enumerate(reader):
            if not row["answer"] or not row["image_id"]:
                raise InputError(f"Row {number + 2} of {source} is not whole.")
            count = len(answer_set(row["answer"]))
            examples.append(
                Example(
                    key=str(number),
                    question_id=number,
                    question=row["question"],
                    image=f"{row['image_id']}.jpg",
                    answers=(row["answer"],),
                    category="one answer" if count == 1 else "several answers",
                )
            )
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        given = answer_set(answer)
        score = float(given == answer_set(example.answers[0]))
        return Judgement(example.key, score, ", ".join(sorted(given)), example.category)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures = {"accuracy": score_figure(judgements, self.scorer)}
        for name in sorted({j.category for j in judgements}):
            group = [j for j in judgements if j.category == name]
            figures[name.replace(" ", "_")] = score_figure(group, self.scorer)
        return figures
