"""easy-VQA: questions about one coloured shape, thirteen answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.answers import InputError, read_json_or_lines
from eval.intervals import Figure
from eval.questions import required
from eval.task import BARE, LLAVA, Example, Judgement, Task, checked, score_figure

_SHAPES = ("circle", "rectangle", "triangle")


class EasyVqa(Task):
    """Exact match after stripping, lower-casing and dropping a final period."""

    name = "easy_vqa"
    scorer = "exact match"
    primary = "accuracy"
    prompts = (LLAVA, BARE)

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads `test/questions.json` (question, answer, picture number); question ids are places from 0."""
        source = required(annotations or questions, "easy-VQA's question JSON (--questions)")
        content = read_json_or_lines(source)
        examples = []
        if not isinstance(content, list):
            raise InputError(f"{source} is no easy-VQA file: expected a list of [question, answer, picture].")
        for number, row in enumerate(content):
            if (
                not isinstance(row, list)
                or len(row) != 3
                or not all(isinstance(cell, str) for cell in row[:2])
            ):
                raise InputError(f"Entry {number + 1} of {source} is not [question, answer, picture].")
            question, answer, picture = row
            kind = "yes_no" if answer in ("yes", "no") else "shape" if answer in _SHAPES else "colour"
            examples.append(
                Example(str(number), number, question, f"{picture}.png", answers=(answer,), category=kind)
            )
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        given = answer.strip().rstrip(".").lower()
        return Judgement(example.key, float(given == example.answers[0]), given, example.category)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        figures = {"accuracy": score_figure(judgements, self.scorer)}
        for name in sorted({j.category for j in judgements}):
            group = [j for j in judgements if j.category == name]
            figures[name] = score_figure(group, self.scorer)
        return figures
