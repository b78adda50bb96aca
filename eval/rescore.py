"""Scores a stored answer file with the official rule of its benchmark.

python -m eval.rescore --task pope --questions questions.jsonl --annotations pope/ --answers answers.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.answers import InputError, Matched, load_answers, match_answers, name_some
from eval.compare import GROUPS, QUESTIONS
from eval.intervals import SEED, Figure
from eval.outputs import check_output, write_output
from eval.provenance import describe_origin
from eval.task import Example, Judgement, Task, hash_question
from eval.tasks import list_tasks, load_task


@dataclasses.dataclass(frozen=True)
class Rescored:
    """The figures (none where the gold answers are hidden), and what there is to know of the answers."""

    task: Task
    examples: tuple[Example, ...]
    matched: Matched
    judgements: tuple[Judgement, ...]
    figures: dict[str, Figure]


def rescore(
    task: Task,
    questions: Path | None,
    annotations: Path | None,
    answers: Path,
    allow_missing: bool = False,
    images: Path | None = None,
) -> Rescored:
    """Scores an answer file.

    Args:
        task: The benchmark.
        questions: Its question file, official or LLaVA's.
        annotations: Its gold answers.
        answers: The stored answers.
        allow_missing: Score the answered questions only, instead of refusing a file with holes.
        images: Picture folder to check, if wanted.

    Raises:
        InputError: If the files do not belong together, are damaged, or answers are missing.
    """
    examples = task.load_examples(questions, annotations, images)
    matched = match_answers(examples, load_answers(answers), task.record_keys)
    return score_answers(task, examples, matched, str(answers), allow_missing)


def score_answers(
    task: Task, examples: Sequence[Example], matched: Matched, source: str, allow_missing: bool = False
) -> Rescored:
    """Scores answers that have found their questions.

    Args:
        task: The benchmark.
        examples: The questions that were asked.
        matched: Their answers.
        source: Where the answers are, for messages.
        allow_missing: Score the answered questions only, instead of refusing holes.

    Raises:
        InputError: If answers are missing.
    """
    if matched.missing and not allow_missing:
        asked = sum(not example.optional for example in examples)
        damaged = f"; not whole: {name_some(matched.damaged)}" if matched.damaged else ""
        unknown = f"; {len(matched.unknown)} answers are to other questions" if matched.unknown else ""
        raise InputError(
            f"{len(matched.missing)} of {asked} questions have no answer in {source} "
            f"({name_some([k.replace(chr(10), ' ') for k in matched.missing])}){damaged}{unknown}. "
            "Answer them, or pass --allow-missing to score the answered ones only."
        )
    judgements = tuple(
        dataclasses.replace(
            task.judge(example, matched.answers[example.key], example.key in matched.as_written),
            picture=example.image or "",
        )
        for example in examples
        if example.key in matched.answers and example.answers
    )
    figures = task.aggregate(judgements) if judgements else {}
    return Rescored(task, tuple(examples), matched, judgements, figures)


def describe_coverage(outcome: Rescored) -> dict[str, Any]:
    """How many questions were asked and answered, and every oddity of the answers, counted and named."""
    matched = outcome.matched
    asked = [example for example in outcome.examples if not example.optional]
    # Where nothing could be scored, the benchmark keeps all gold answers to itself.
    bare = [example.key for example in outcome.examples if not example.answers and outcome.judgements]
    odd = {
        "same_id": [example.key for example in outcome.examples if example.twin],
        "unlabelled": bare,
        "missing": matched.missing,
        "unknown": matched.unknown,
        "repeated": matched.repeated,
        "empty": matched.empty,
        "long": matched.long,
        "non_latin": matched.foreign,
        "reworded": matched.reworded,
        "damaged": matched.damaged,
    }
    return {
        "asked": len(asked),
        "answered": len(asked) - len(matched.missing),
        "scored": len(outcome.judgements),
        **{name: {"count": len(keys), "first": list(keys[:20])} for name, keys in odd.items()},
    }


def format_report(outcome: Rescored) -> str:
    """The printed table, with the notes that belong to it."""
    lines = []
    shown = {name: figure for name, figure in outcome.figures.items() if not figure.detail}
    if shown:
        width = max(len(name) for name in shown)
        lines.append(f"{'figure':<{width}}  {'value':>9}  {'95 % interval':>20}  {'n':>7}  protocol")
        for name, figure in shown.items():
            lines.append(
                f"{name:<{width}}  {_format(figure)}  {figure.n:>7}  {figure.protocol} ({figure.method})"
            )
    lines.extend(_notes(outcome))
    return "\n".join(lines)


def _format(figure: Figure) -> str:
    unit = "%" if figure.unit == "%" else " "
    if math.isnan(figure.low):
        return f"{figure.value:>8.2f}{unit}  {'undefined':>20}"
    return f"{figure.value:>8.2f}{unit}  {figure.low:>9.2f} ... {figure.high:>6.2f}"


def _notes(outcome: Rescored) -> list[str]:
    coverage = describe_coverage(outcome)
    notes = [f"answered: {coverage['answered']} of {coverage['asked']} questions"]
    if coverage["missing"]["count"]:
        notes.append("every figure is over the answered questions only")
    if not outcome.judgements:
        notes.append(f"no figures: {outcome.task.scorer}, or the files hold no gold answers")
    what = {
        "same_id": "questions with the id of an earlier one, scored like all others",
        "unlabelled": "questions without a gold answer, left out of every figure",
        "missing": "questions without an answer",
        "unknown": "answers to questions that were not asked, left out",
        "repeated": "questions answered more than once, always alike",
        "empty": f"empty answers, which the rule reads as {outcome.task.empty_reads}",
        "long": "answers of more than 1,000 characters",
        "non_latin": "answers with letters of another script than Latin",
        "reworded": "answers whose stored prompt does not hold their question, scored like all others",
        "damaged": "lines that are not whole, left out",
    }
    for name, meaning in what.items():
        count, first = coverage[name]["count"], coverage[name]["first"]
        if count:
            shown = ", ".join(str(key).replace("\n", " ") for key in first[:5])
            notes.append(f"{count} {meaning}: {shown}{' ...' if count > 5 else ''}")
    return notes


def to_json(outcome: Rescored, files: dict[str, str | None]) -> dict[str, Any]:
    """Everything `eval.compare` and a report need."""
    return {
        "task": outcome.task.name,
        "scorer": outcome.task.scorer,
        "primary": outcome.task.primary,
        "files": files,
        "seed": SEED,
        "coverage": describe_coverage(outcome),
        "figures": {
            name: {key: _plain(value) for key, value in dataclasses.asdict(figure).items()}
            for name, figure in outcome.figures.items()
        },
        "units": outcome.task.units(outcome.judgements),
        GROUPS: outcome.task.groups(outcome.judgements),
        QUESTIONS: {e.key: hash_question(e) for e in outcome.examples if e.question},
    }


def _plain(value: Any) -> Any:
    """NaN has no spelling in JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.rescore", description=__doc__.split("\n")[0])
    parser.add_argument("--task", required=True, help=", ".join(list_tasks()))
    parser.add_argument("--questions", type=Path, help="question file, official or LLaVA's")
    parser.add_argument("--annotations", type=Path, help="file or folder with the gold answers")
    parser.add_argument("--answers", type=Path, required=True, help="stored answers")
    parser.add_argument("--json", type=Path, help="write figures, coverage and scores here")
    parser.add_argument(
        "--submission", type=Path, help="write the file for the benchmark's server or judge here"
    )
    parser.add_argument("--images", type=Path, help="check that every picture is in this folder")
    parser.add_argument("--allow-missing", action="store_true", help="score the answered questions only")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    try:
        read = (options.questions, options.annotations, options.answers)
        check_output(options.json, "--json", (*read, options.submission))
        check_output(options.submission, "--submission", read)
        task = load_task(options.task)
        # A submission needs no gold answers, and a graded benchmark has no figures.
        outcome = rescore(
            task,
            options.questions,
            options.annotations,
            options.answers,
            options.allow_missing,
            options.images,
        )
        if not outcome.judgements and options.submission is None:
            raise InputError(
                f"There is nothing to score: {task.name}'s files hold no gold answers here. "
                "Pass --submission FILE to write the file for its server or judge."
            )
        if options.submission is not None:
            matched = outcome.matched
            made = task.submission(outcome.examples, matched.answers, matched.as_written)
            if made is None:
                raise InputError(f"{task.name} has no submission format.")
            suffix, content = made
            if options.submission.suffix != suffix:
                raise InputError(f"{task.name}'s submission is a {suffix} file; {options.submission} is not.")
            write_output(options.submission, content, "--submission")
        print(f"{task.name}: {options.answers}")
        print(format_report(outcome))
        if options.json is not None:
            names = ("questions", "annotations", "answers")
            files = {name: str(path) if (path := getattr(options, name)) else None for name in names}
            settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
            origin = describe_origin("eval.rescore", words, settings)
            record = {**to_json(outcome, files), "provenance": origin}
            write_output(options.json, json.dumps(record, indent=1, ensure_ascii=False), "--json")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
