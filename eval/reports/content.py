"""What a report says, as JSON values: every other form of the report is made of this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.answers import InputError, name_some
from eval.compare import Comparison, compare_records, list_other_questions
from eval.reports.examples import Group, choose_examples
from eval.reports.inputs import Source

FORMAT = "sparse_vlm.report"
_PROVENANCE = ("command", "commit", "config_sha256", "device", "date", "versions")
# Of a point of a comparison of towers: everything but single answers, which belong to the run's own files.
_NOT_OF_POINTS = ("units", "answers")


@dataclass(frozen=True)
class Benchmark:
    """All runs of one benchmark under one scoring rule.

    Attributes:
        task: Its name.
        scorer: The rule.
        primary: The figure that stands for it.
        runs: In the order they were named; floors among them.
        comparisons: Pairs of runs, as JSON values.
        notes: What could not be compared, and why.
        groups: Example questions.
    """

    task: str
    scorer: str
    primary: str
    runs: tuple[Source, ...]
    comparisons: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Content:
    """A whole report.

    Attributes:
        title: Of the page.
        origin: Provenance of the report itself.
        sources: Everything it is made of.
        benchmarks: VQA benchmarks.
    """

    title: str
    origin: dict[str, Any]
    sources: tuple[Source, ...]
    benchmarks: tuple[Benchmark, ...]

    def of(self, kind: str) -> list[Source]:
        """Sources of a kind."""
        return [source for source in self.sources if source.kind == kind]


def build_content(
    sources: Sequence[Source],
    title: str,
    origin: Mapping[str, Any],
    count: int = 3,
    on_benchmark: Callable[[str], object] = lambda name: None,
) -> Content:
    """Puts runs of one benchmark together, compares them and draws examples.

    Args:
        sources: What was named.
        title: Of the page.
        origin: Provenance of the report.
        count: Examples of each kind; 0 for none, which needs no file of the benchmark.
        on_benchmark: Called with each benchmark's name before its work.

    Raises:
        InputError: If runs that should be comparable have nothing in common, or files are missing.
    """
    by_task: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        if source.kind in ("run", "scores"):
            by_task.setdefault((source.content["task"], source.content["scorer"]), []).append(source)
    made = []
    for (task, scorer), runs in by_task.items():
        on_benchmark(task)
        comparisons, notes = compare_runs(runs)
        seeing = [run for run in runs if run.kind == "run" and floor_of(run) is None]
        alike = [run for run in seeing if _asks_alike(run, seeing[0])]
        groups = choose_examples(alike, count) if alike and count else []
        primary = runs[0].content["primary"]
        made.append(
            Benchmark(task, scorer, primary, tuple(runs), tuple(comparisons), tuple(notes), tuple(groups))
        )
    return Content(title, dict(origin), tuple(sources), tuple(made))


def floor_of(run: Source) -> str | None:
    """ "no-image", "random-picture", or None for a run that sees."""
    floor: str | None = run.content.get("floor")
    return floor


def protocol_of(run: Source) -> str | None:
    """The prompt's protocol; None for rescored answers, which do not tell."""
    protocol: str | None = run.content.get("protocol")
    return protocol


def compare_runs(runs: Sequence[Source]) -> tuple[list[dict[str, Any]], list[str]]:
    """Every seeing run against the first one, and every run that sees against the same model's floors.

    Returns:
        Comparisons with "runs" (numbers of the two sources), "what" ("towers" or "eyes") and the fields of
        `eval.compare.Comparison`; and notes.
    """
    seeing = [run for run in runs if floor_of(run) is None]
    pairs = [("towers", seeing[0], other) for other in seeing[1:]]
    for floor in (run for run in runs if floor_of(run) is not None):
        own = [run for run in seeing if run.content.get("model") == floor.content.get("model")]
        pairs += [("eyes", floor, run) for run in own]
    comparisons, notes = [], []
    for what, first, second in pairs:
        if protocol_of(first) != protocol_of(second):
            notes.append(
                f"{first.label} and {second.label} are not compared: their prompts follow "
                f"{_protocol(first)} and {_protocol(second)}."
            )
            continue
        unscored = [run.label for run in (first, second) if not run.content["units"]]
        if unscored:
            notes.append(
                f"{first.label} and {second.label} are not compared: no question of {' and '.join(unscored)} "
                "has a score here."
            )
            continue
        other = list_other_questions(first.content, second.content)
        if other:
            notes.append(
                f"{first.label} and {second.label} are not compared: {len(other)} questions of the same keys "
                f"are others in the two ({name_some(other)})."
            )
            continue
        made = _compare(first, second)
        runs_of = [first.number, second.number]
        comparisons.append({"what": what, "runs": runs_of, **dataclasses.asdict(made)})
        if made.dropped:
            notes.append(
                f"{first.label} and {second.label}: {made.dropped} questions that only one of them answered "
                "are left out of their comparison."
            )
    return comparisons, notes


def _asks_alike(run: Source, first: Source) -> bool:
    same = protocol_of(run) == protocol_of(first)
    return same and not list_other_questions(run.content, first.content)


def _compare(first: Source, second: Source) -> Comparison:
    try:
        return compare_records(first.content, second.content)
    except InputError as error:
        raise InputError(f"{first.path} and {second.path}: {error}") from None


def _protocol(run: Source) -> str:
    return protocol_of(run) or "an unknown protocol (rescored)"


def to_values(content: Content) -> dict[str, Any]:
    """The report as JSON values; pictures by their file names."""
    return {
        "format": FORMAT,
        "title": content.title,
        "origin": content.origin,
        "sources": [
            {
                "number": source.number,
                "kind": source.kind,
                "label": source.label,
                "path": str(source.path),
                **{key: source.provenance.get(key) for key in _PROVENANCE},
            }
            for source in content.sources
        ],
        "benchmarks": [_benchmark_values(benchmark) for benchmark in content.benchmarks],
        "pareto": [
            {
                "source": source.number,
                **{k: v for k, v in source.content.items() if k not in ("points", "provenance")},
                "points": [trim_point(point) for point in source.content["points"]],
            }
            for source in content.of("pareto")
        ],
        "cost": [_without_provenance(source) for source in content.of("cost")],
        "encoder": [_without_provenance(source) for source in content.of("encoder")],
    }


def _without_provenance(source: Source) -> dict[str, Any]:
    return {"source": source.number, **{k: v for k, v in source.content.items() if k != "provenance"}}


def trim_point(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point without its single answers."""
    kept = {key: value for key, value in point.items() if key not in _NOT_OF_POINTS}
    if isinstance(kept.get("random-picture"), Mapping):
        kept["random-picture"] = trim_point(kept["random-picture"])
    return kept


def _benchmark_values(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "task": benchmark.task,
        "scorer": benchmark.scorer,
        "primary": benchmark.primary,
        "runs": [
            {
                "source": run.number,
                "model": run.content.get("model"),
                "floor": floor_of(run),
                "protocol": protocol_of(run),
                "visual_tokens": run.content.get("visual_tokens"),
                "coverage": run.content["coverage"],
                "figures": run.content["figures"],
            }
            for run in benchmark.runs
        ],
        "comparisons": list(benchmark.comparisons),
        "notes": list(benchmark.notes),
        "examples": [
            {
                "group": group.name,
                "of": group.of,
                "shown": [
                    {
                        "key": shown.key,
                        "question": shown.question,
                        "choices": list(shown.choices),
                        "gold": list(shown.gold),
                        "image": shown.image,
                        "answers": [dataclasses.asdict(answer) for answer in shown.answers],
                    }
                    for shown in group.shown
                ],
            }
            for group in benchmark.groups
        ],
    }
