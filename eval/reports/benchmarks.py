"""The sections about VQA benchmarks: figures with intervals, and what an exchange of towers costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.reports.charts import Span, draw_spans
from eval.reports.content import Benchmark, floor_of, protocol_of
from eval.reports.inputs import Source
from eval.reports.parts import (
    chart,
    esc,
    figure_cell,
    figure_name,
    named,
    notes,
    section,
    show_p,
    signed,
    table,
)
from eval.reports.words import name_figure, name_interval, name_prompts, name_task

_FLOORS = {"no-image": "without the picture", "random-picture": "with a wrong picture"}
_SHOWN = 8  # figures before the rest is folded away


def name_run(run: Source) -> str:
    """A run's label; a floor's says that it is one."""
    floor = floor_of(run)
    return run.label if floor is None else f"{run.label}, {_FLOORS.get(floor, floor)}"


def tones(runs: Sequence[Source]) -> dict[int, str]:
    """A colour for each run by its number: the first is what others are compared with."""
    seeing = [run.number for run in runs if floor_of(run) is None]
    made = {number: f"tone-{min(place, 5)}" for place, number in enumerate(seeing)}
    return {run.number: made.get(run.number, "tone-floor") for run in runs}


def describe_comparison(made: Mapping[str, Any], runs: Mapping[int, Source]) -> str:
    """A comparison in one sentence."""
    first, second = (runs[number] for number in made["runs"])
    gap = f"{signed(made['difference'])} points [{signed(made['low'])}, {signed(made['high'])}]"
    sure = not made["low"] <= 0 <= made["high"]
    if made["what"] == "eyes":
        end = "" if sure else ", which may be nothing"
        return f"{name_run(second)} owes {gap} to its eyes ({name_run(first)}: {made['first']:.1f} %){end}."
    end = "" if sure else ": no difference shown"
    return f"{name_run(second)}: {gap} against {name_run(first)}{end}, n = {made['n']:,}."


def benchmark_section(benchmarks: Sequence[Benchmark]) -> str:
    """All benchmarks, a card each."""
    lead = (
        "Each figure with its 95 % interval, under the scoring rule beside it. Hollow dots are floors: the "
        "same model without the picture, or with another question’s. What a model reaches there, it does not "
        "owe to its eyes."
    )
    return section("Benchmarks", lead, "".join(_card(benchmark) for benchmark in benchmarks))


def _card(benchmark: Benchmark) -> str:
    runs = benchmark.runs
    with_figures = [run for run in runs if benchmark.primary in run.content["figures"]]
    drawing = ""
    if with_figures:
        colours = tones(runs)
        first = with_figures[0].content["figures"][benchmark.primary]
        rows = [
            _span(run, run.content["figures"][benchmark.primary], colours[run.number]) for run in with_figures
        ]
        primary = name_figure(benchmark.primary)
        axis = f"{primary}, {first['unit']}"
        drawing = chart(draw_spans(rows, f"{name_task(benchmark.task)}: {primary}", axis))
    remarks = [*_coverage(runs), *benchmark.notes]
    if not with_figures:
        others = any(run.content["figures"] for run in runs)
        remarks.insert(
            0,
            f"No run has the figure “{name_figure(benchmark.primary)}”: none of the questions that it stands "
            "on was asked."
            if others
            else "No figures: this benchmark is scored by a server or a judge.",
        )
    facts = "; ".join(dict.fromkeys(name_prompts(protocol_of(run)) for run in runs))
    figures, rows_shown = _figures(benchmark)
    # Beside a table that is much longer than the drawing, half of the card would stay empty.
    layout = "pair" if len(runs) < 3 and rows_shown <= 2 * len(runs) + 1 else "stack"
    body = f'<div class="{layout}">{drawing}{figures}</div>' if drawing or figures else ""
    return (
        f'<article class="card" id="task-{esc(benchmark.task)}"><header>'
        f"<h3>{esc(name_task(benchmark.task))}</h3>"
        f'<p class="facts">{esc(benchmark.scorer)}; {esc(facts)}</p></header>'
        f"{body}{notes(remarks)}</article>"
    )


def _span(run: Source, figure: Mapping[str, Any], css: str) -> Span:
    tokens = run.content.get("visual_tokens")
    label = name_run(run)
    if tokens and floor_of(run) is None:
        label += f" · {tokens:.0f} tokens"
    low, high = (figure["value"] if figure[end] is None else figure[end] for end in ("low", "high"))
    text = f"{figure['value']:.1f} {figure['unit'] if figure['unit'] == '%' else ''}".strip()
    return Span(label, figure["value"], low, high, text, css, floor_of(run) is not None)


def _figures(benchmark: Benchmark) -> tuple[str, int]:
    """Figures down, runs across; and how many rows are not folded away."""
    runs = benchmark.runs
    everything: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for name, figure in run.content["figures"].items():
            everything.setdefault(name, figure)
    if not everything:
        return "", 0
    names = sorted(everything, key=lambda name: (name != benchmark.primary, everything[name]["detail"]))
    plain = [name for name in names if not everything[name]["detail"]][:_SHOWN]
    rest = [name for name in names if name not in plain]
    head = ["figure", *(_head(run) for run in runs), "n", "rule"]
    shown = table(head, [_row(name, everything[name], runs) for name in plain], "figures", 0)
    if rest:
        more = table(head, [_row(name, everything[name], runs) for name in rest], "figures")
        shown += f"<details><summary>{len(rest)} more figures</summary>{more}</details>"
    return f"<div>{shown}</div>", len(plain)


def _head(run: Source) -> str:
    tokens = run.content.get("visual_tokens")
    below = f'<span class="sub">{tokens:.0f} visual tokens</span>' if tokens is not None else ""
    floor = floor_of(run)
    kind = f'<span class="sub">{esc(_FLOORS.get(floor, floor))}</span>' if floor else below
    return f"{named(run)}{kind}"


def _row(name: str, any_figure: Mapping[str, Any], runs: Sequence[Source]) -> list[str]:
    figures = [run.content["figures"].get(name) for run in runs]
    counts = sorted({figure["n"] for figure in figures if figure})
    unit = "" if any_figure["unit"] == "%" else f", {esc(any_figure['unit'])}"
    rule = ", ".join(filter(None, (any_figure["protocol"], name_interval(any_figure["method"]))))
    n = " / ".join(f"{count:,}" for count in counts)
    return [
        f"{figure_name(name)}{unit}",
        *(figure_cell(figure) for figure in figures),
        n,
        f'<span class="rule">{esc(rule)}</span>',
    ]


def _coverage(runs: Sequence[Source]) -> list[str]:
    """What is odd about the answers, in words."""
    words = {
        "same_id": "with the id of an earlier question, scored like all others",
        "unlabelled": "without a gold answer, left out",
        "missing": "without an answer",
        "unknown": "answers to questions that were not asked, left out",
        "repeated": "answered more than once, always alike",
        "empty": "empty answers",
        "long": "answers of more than 1,000 characters",
        "non_latin": "answers in another script than Latin",
        "reworded": "answers whose stored prompt does not hold their question, scored like all others",
        "damaged": "lines that are not whole, left out",
    }
    notes = []
    for run in runs:
        coverage = run.content["coverage"]
        odd = [
            f"{meaning}: {coverage[name]['count']:,}"
            for name, meaning in words.items()
            if coverage.get(name, {}).get("count")
        ]
        if odd or coverage["answered"] != coverage["asked"]:
            answered = f"{coverage['answered']:,} of {coverage['asked']:,} questions answered"
            notes.append(f"{name_run(run)}: {'; '.join([answered, *odd])}.")
    return notes


def exchange_section(benchmarks: Sequence[Benchmark]) -> str:
    """Paired comparisons of all benchmarks; empty where there are none."""
    rows, spans = [], []
    for benchmark in benchmarks:
        runs = {run.number: run for run in benchmark.runs}
        for made in benchmark.comparisons:
            first, second = (runs[number] for number in made["runs"])
            alone = "" if made["only_first"] is None else f"{made['only_second']} / {made['only_first']}, "
            reason = "pictures drawn" if made["grouped"] else "soft scores"
            test = alone + (f"{reason}: no McNemar test" if made["p"] is None else show_p(made["p"]))
            rows.append(
                [
                    esc(name_task(benchmark.task)),
                    f"{named(second)} − {named(first)}{_kind(made, first)}",
                    f'<span class="value">{signed(made["difference"], 2)}</span>'
                    f'<span class="interval">{signed(made["low"], 2)} … {signed(made["high"], 2)}</span>',
                    f"{made['first']:.2f} → {made['second']:.2f}",
                    f"{made['n']:,}",
                    test,
                ]
            )
            eyes = made["what"] == "eyes"
            label = f"{name_task(benchmark.task)}: {second.label}" + (
                f" − {_FLOORS.get(floor_of(first) or '', 'its floor')}" if eyes else f" − {first.label}"
            )
            spans.append(
                Span(
                    label,
                    made["difference"],
                    made["low"],
                    made["high"],
                    signed(made["difference"]),
                    "tone-floor" if eyes else "tone-1",
                    eyes,
                )
            )
    if not rows:
        return ""
    head = ["benchmark", "pair", "points", "means, %", "n", "only this / only that right"]
    lead = (
        "The same questions, answered by both: the difference of the mean score with its paired bootstrap "
        "interval, and McNemar’s exact test where answers are right or wrong and each is alone. An interval "
        "that holds zero shows no difference."
    )
    drawing = chart(draw_spans(spans, "Differences with 95 % intervals", "percentage points", zero=True))
    body = f'<article class="card stack">{drawing}{table(head, rows)}</article>'
    return section("Paired comparisons", lead, body)


def _kind(made: Mapping[str, Any], first: Source) -> str:
    if made["what"] != "eyes":
        return ""
    return f'<span class="sub">{esc(_FLOORS.get(floor_of(first) or "", "floor"))}</span>'
