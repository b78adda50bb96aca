"""Compares two runs on the same questions: paired bootstrap interval and McNemar's exact test.

python -m eval.compare RUN_A RUN_B
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.answers import InputError, name_some, read_json
from eval.intervals import bootstrap_groups, bootstrap_mean, mcnemar_exact
from eval.outputs import check_output, write_output

SCORES = "scores.json"
GROUPS = "unit_groups"
"""In it, by key, the picture of a question, where a comparison draws pictures; not in earlier versions'."""
QUESTIONS = "question_hashes"
"""In it, by key, what tells whether two runs were asked the same; not in those of earlier versions."""


@dataclass(frozen=True)
class Comparison:
    """B minus A over the questions that both runs answered, in percent.

    Attributes:
        n: Questions compared.
        first: Mean score of A.
        second: Mean score of B.
        difference: B minus A.
        low: Lower end of the difference's 95 % interval (paired bootstrap).
        high: Upper end.
        only_first: Questions that only A got right; None where scores are soft.
        only_second: Questions that only B got right; None where scores are soft.
        p: Two-sided p of McNemar's exact test; None where scores are soft or grouped.
        dropped: Questions that only one of the runs answered.
        grouped: Whether the bootstrap drew pictures with all their questions.
    """

    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    only_first: int | None
    only_second: int | None
    p: float | None
    dropped: int
    grouped: bool = False


def load_run(path: Path) -> dict[str, Any]:
    """Reads what `eval.rescore --json` wrote, or the `scores.json` of a run's folder.

    Raises:
        InputError: If it is neither.
    """
    file = _file_of(path)
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("units"), dict):
        raise InputError(
            f'{file} holds no scores of single questions ("units"); was it written by eval.rescore?'
        )
    if not content["units"]:
        raise InputError(f"{file} holds the scores of no question.")
    for key, score in content["units"].items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise InputError(
                f"{file}: units.{key} must be a score of 0 to 1, and is {json.dumps(score)[:40]}."
            )
    groups = content.get(GROUPS)
    if groups is not None and not (
        isinstance(groups, dict) and all(isinstance(picture, str) for picture in groups.values())
    ):
        raise InputError(f"{file}: {GROUPS} must be an object of pictures by question.")
    return content


def _file_of(run: Path) -> Path:
    return run / SCORES if run.is_dir() else run


def compare_groups(first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable]) -> Comparison:
    """Compares two runs' scores of questions that come in groups; the bootstrap draws groups.

    Args:
        first: A's scores, 0 to 1, one a question.
        second: B's of the same questions.
        groups: The group of each question, such as the picture that a caption is of.
    """
    n = len(groups)
    gains = [after - before for before, after in zip(first, second, strict=True)]
    low, high = bootstrap_groups(gains, groups)
    means = (100 * float(sum(first)) / n, 100 * float(sum(second)) / n)
    difference = 100 * float(sum(gains)) / n
    alone = _count_only(first, second)
    # McNemar's test takes questions for independent, which these are not.
    return Comparison(n, *means, difference, 100 * low, 100 * high, alone[0], alone[1], None, 0, grouped=True)


def _count_only(first: Sequence[float], second: Sequence[float]) -> tuple[int, int] | tuple[None, None]:
    """Questions that one run alone got right; None twice where scores are soft."""
    if any(score not in (0, 1) for score in (*first, *second)):
        return None, None
    pairs = list(zip(first, second, strict=True))
    return sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)


def compare_scores(first: Mapping[str, float], second: Mapping[str, float]) -> Comparison:
    """Compares two runs' scores, 0 ... 1 by question.

    Raises:
        InputError: If they have no question in common.
    """
    shared = [key for key in first if key in second]
    dropped = len(first) + len(second) - 2 * len(shared)
    if not shared:
        raise InputError(
            "The two runs share no question "
            f"({name_some(list(first), 3)} against {name_some(list(second), 3)})."
        )
    gains = [second[key] - first[key] for key in shared]
    low, high = bootstrap_mean(gains)
    only_first, only_second = _count_only([first[key] for key in shared], [second[key] for key in shared])
    p = None if only_first is None or only_second is None else mcnemar_exact(only_first, only_second)
    n = len(shared)
    return Comparison(
        n,
        100 * sum(first[key] for key in shared) / n,
        100 * sum(second[key] for key in shared) / n,
        100 * sum(gains) / n,
        100 * low,
        100 * high,
        only_first,
        only_second,
        p,
        dropped,
    )


def compare_records(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compares what two runs of one benchmark have written; by pictures where their questions go together.

    Raises:
        InputError: If they have no question in common.
    """
    first, second = a["units"], b["units"]
    pictures = a.get(GROUPS) or b.get(GROUPS) or {}
    shared = [key for key in first if key in second]
    if not shared or not all(key in pictures for key in shared):
        return compare_scores(first, second)
    made = compare_groups(
        [first[key] for key in shared], [second[key] for key in shared], [pictures[key] for key in shared]
    )
    return replace(made, dropped=len(first) + len(second) - 2 * len(shared))


def list_other_questions(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys under which two runs' scores know different questions; none of scores that do not tell."""
    first, second = (run.get(QUESTIONS) for run in (a, b))
    if not isinstance(first, dict) or not isinstance(second, dict):
        return []
    return [key.replace("\n", " ") for key, known in first.items() if second.get(key, known) != known]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__.split("\n")[0])
    parser.add_argument("run_a", type=Path, help="a run's folder, or the JSON of eval.rescore")
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--json", type=Path, help="write the comparison here")
    parser.add_argument(
        "--allow-missing", action="store_true", help="compare the questions that both runs answered only"
    )
    options = parser.parse_args(arguments)
    try:
        check_output(options.json, "--json", map(_file_of, (options.run_a, options.run_b)))
        a, b = load_run(options.run_a), load_run(options.run_b)
        for field in ("task", "scorer"):
            if a.get(field) != b.get(field):
                raise InputError(f"The runs differ in {field}: {a.get(field)!r} and {b.get(field)!r}.")
        other = list_other_questions(a, b)
        if other:
            raise InputError(
                f"{len(other)} questions of the same keys are others in the two runs, or have other gold "
                f"answers ({name_some(other)}): only runs of the same questions are compared. Of two copies "
                "of them, take one for both (eval.rescore)."
            )
        protocols = [run.get("protocol") for run in (a, b)]
        if None not in protocols and protocols[0] != protocols[1]:  # rescored answers do not tell theirs
            raise InputError(
                f"The runs' prompts follow different protocols, {protocols[0]} and {protocols[1]}: what they "
                "differ in would be the prompts' doing, too."
            )
        made = compare_records(a, b)
        if made.dropped and not options.allow_missing:
            raise InputError(
                f"{made.dropped} questions were answered by one of the runs only; "
                "pass --allow-missing to compare the other ones."
            )
        names = [f"{path}{_floor(run)}" for path, run in ((options.run_a, a), (options.run_b, b))]
        print(format_comparison(made, a.get("task", ""), *names))
        if options.json is not None:
            write_output(options.json, json.dumps(asdict(made), indent=1), "--json")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _floor(run: Mapping[str, Any]) -> str:
    floor = run.get("floor") or "none"
    return "" if floor == "none" else f" (floor: {floor})"


def format_comparison(made: Comparison, task: str, first: str, second: str) -> str:
    """The printed comparison."""
    drawn = " over pictures" if made.grouped else ""
    lines = [
        f"{task}, score a question, n = {made.n}",
        f"A  {made.first:7.2f} %  {first}",
        f"B  {made.second:7.2f} %  {second}",
        f"B - A  {made.difference:+.2f} points, 95 % {made.low:+.2f} ... {made.high:+.2f} "
        f"(paired bootstrap{drawn})",
    ]
    if made.p is not None:
        lines.append(
            f"only A right: {made.only_first}, only B right: {made.only_second}, "
            f"McNemar exact p = {made.p:.3g}"
        )
    elif made.grouped:
        if made.only_first is not None:
            lines.append(f"only A right: {made.only_first}, only B right: {made.only_second}")
        lines.append("McNemar's test is for independent questions; several of these are about one picture")
    else:
        lines.append("McNemar's test is for right-or-wrong scores; these are soft")
    if made.dropped:
        lines.append(f"{made.dropped} questions that only one of the runs answered were left out")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
