"""MMBench: multiple choice, each question asked once for every rotation of its options."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_text
from eval.intervals import Figure, accuracy_figure
from eval.metrics.choices import read_mmbench
from eval.questions import required
from eval.task import OPTION_LETTER, Example, Judgement, Task, checked
from eval.workbook import build_workbook

_ROUND = 1_000_000
_OPTIONS = "ABCD"
# What pandas reads as a missing cell; LLaVA's and MMBench's own scripts read the file with it.
_MISSING = frozenset(
    ("", "<NA>", "NULL", "null", "None", "NaN", "nan", "-NaN", "-nan", "NA", "N/A", "n/a", "#NA", "#N/A")
).union(("#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"))
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")


class MmBench(Task):
    """Circular: a question counts if it is right under every rotation. Vanilla: the first one only."""

    name = "mmbench"
    scorer = "VLMEvalKit, exact matching"
    primary = "circular"
    empty_reads = "wrong, unless one option alone is the empty text"

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads the TSV. Its pictures are text within it; `images` is for pictures saved as INDEX.jpg."""
        source = required(annotations or questions, "MMBench's TSV (--questions)")
        rows = _load_table(source)
        examples = [_example(row, number, source) for number, row in enumerate(rows, start=2)]
        labelled = sum(bool(example.answers) for example in examples)
        if 0 < labelled < len(examples):
            raise InputError(f"{source} has answers to {labelled} of its {len(examples)} questions only.")
        whole = {example.key for example in examples}
        orphans = [e.key for e in examples if e.facts["group"] not in whole]
        if orphans:
            raise InputError(
                f"{len(orphans)} rotated rows of {source} lack their first row ({name_some(orphans)})."
            )
        sizes = Counter(example.facts["group"] for example in examples)
        examples = [replace(e, facts={**e.facts, "rotations": sizes[e.facts["group"]]}) for e in examples]
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        letter = read_mmbench(answer, example.facts["options"])
        facts = {name: example.facts[name] for name in ("group", "rotations", "l2", "split")}
        return Judgement(example.key, float(letter == example.answers[0]), letter, example.category, facts)

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        first = [j for j in judgements if j.key == j.facts["group"]]
        hits = self.units(judgements)
        figures = {}
        if hits:
            figures["circular"] = accuracy_figure(list(hits.values()), self.scorer)
        if first:
            figures["vanilla"] = accuracy_figure([j.score for j in first], self.scorer)
        splits = sorted({j.facts["split"] for j in first})
        kinds = {"l2_category": "l2", "category": ""}
        if len(splits) > 1:
            kinds["split"] = "split"
        for title, fact in kinds.items():
            groups: dict[str, list[float]] = {}
            for j in first:
                if j.key in hits:
                    groups.setdefault(j.facts[fact] if fact else j.category, []).append(hits[j.key])
            for name in sorted(groups.keys() - {""}):
                figures[f"{title}/{name}"] = accuracy_figure(
                    groups[name], self.scorer, detail=title == "category"
                )
        return figures

    def units(self, judgements: Sequence[Judgement]) -> dict[str, float]:
        """Questions whose every rotation was judged: 1 if all are right."""
        groups: dict[str, list[Judgement]] = {}
        for judgement in judgements:
            groups.setdefault(judgement.facts["group"], []).append(judgement)
        return {
            name: min(j.score for j in group)
            for name, group in groups.items()
            if len(group) == group[0].facts["rotations"]
        }

    def llava_prompt(self, example: Example) -> str:
        hint = example.facts["hint"] or ""
        lead = f"{hint}\n" if hint.lower() not in ("", "nan", "none") else ""
        options = []
        for letter in _OPTIONS:
            text = example.facts["options"].get(letter)
            if text is None or text.lower() in ("nan", "none"):
                break
            options.append(f"\n{letter}. {text}")
        return f"{lead}{example.question}{''.join(options)}{OPTION_LETTER}"

    def lmms_prompt(self, example: Example) -> str:
        lead = f"{example.facts['hint']} " if example.facts["hint"] else ""
        options = "\n".join(f"{letter}. {text}" for letter, text in example.facts["options"].items())
        # Two line breaks before the instruction, as lmms-eval has them.
        return f"{lead}{example.question} There are several options:\n{options}\n{OPTION_LETTER}"

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        kept = [name for name in examples[0].facts["row"] if name not in _NOT_SUBMITTED]
        kept.insert(6, "prediction")
        table: list[list[str | int | None]] = [list(kept)]
        for example in examples:
            row = {**example.facts["row"], "prediction": answers.get(example.key)}
            table.append([int(row[name]) if name == "index" else row[name] for name in kept])
        return ".xlsx", build_workbook(table)


def _load_table(path: Path) -> list[dict[str, Any]]:
    # A row holds a whole picture.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    wanted = {"index", "question", "A", "B"}
    if not wanted <= set(reader.fieldnames or ()):
        raise InputError(f"{path} is no MMBench TSV: expected columns {', '.join(sorted(wanted))}.")
    return [
        {name: None if value is None or value in _MISSING else value for name, value in row.items() if name}
        for row in reader
    ]


def _example(row: dict[str, Any], number: int, path: Path) -> Example:
    try:
        index = int(row["index"])
    except (TypeError, ValueError):
        raise InputError(f"Row {number} of {path}: the index {row['index']!r} is no number.") from None
    options = {letter: row[letter] for letter in _OPTIONS if row.get(letter) is not None}
    answer = row.get("answer")
    if answer is not None and answer not in options:
        raise InputError(f"Question {index} of {path}: the answer {answer!r} is none of its options.")
    return Example(
        key=str(index),
        question_id=index,
        question=row["question"] or "",
        image=f"{index % _ROUND}.jpg",
        answers=() if answer is None else (answer,),
        choices=tuple(options.values()),
        category=row.get("category") or "",
        facts={
            "group": str(index % _ROUND),
            "hint": row.get("hint"),
            "options": options,
            "l2": row.get("l2-category") or "",
            "split": row.get("split") or "",
            "row": row,
        },
    )
