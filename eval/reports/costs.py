"""The sections about cost: accuracy against it, what is counted, what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.baselines.combine import OURS
from eval.baselines.table import name_method
from eval.reports.charts import Bar, draw_bars
from eval.reports.inputs import Source
from eval.reports.parts import chart, esc, figure_cell, figure_name, legend, ref, section, signed, table
from eval.reports.scatter import draw_scatter, marker, name_skipped
from eval.reports.svg import short
from eval.reports.words import name_task, say_times

_PIECES = (("tower", "piece-tower"), ("projector", "piece-projector"), ("prefill", "piece-prefill"))


def pareto_section(sources: Sequence[Source]) -> str:
    """Accuracy against total cost, a card a comparison."""
    if not sources:
        return ""
    lead = (
        "Every point is a tower at N visual tokens, with the same teacher, language model, data and steps. "
        "Up is better, left is cheaper. The intervals cover the choice of pictures, not of trainings."
    )
    return section("Accuracy against cost", lead, "".join(_comparison(source) for source in sources))


def _comparison(source: Source) -> str:
    content = source.content
    points, primary = content["points"], content["primary"]
    methods = dict.fromkeys(p["method"] for p in points if p["method"] != "no-image")
    keys = "".join(
        f'<li class="method method-{esc(m)}"><svg class="key" viewBox="0 0 14 14" aria-hidden="true">'
        f'<path class="dot" d="{marker(m, 7, 7, 4)}"/></svg>{esc(name_method(m))}</li>'
        for m in sorted(methods, key=lambda m: (m != OURS, m != "vit"))
    )
    gmacs = draw_scatter(points, primary, "gmacs", "GMACs per answer begun (tower, projector, prefill)")
    clock = draw_scatter(points, primary, "ms", "milliseconds to the first word")
    device, asked = source.provenance.get("device"), content.get("prompt_tokens")
    captions = (
        "Multiply-adds, counted" + (f"; a question of {asked} tokens." if asked is not None else "."),
        f"Measured: median, quartiles as horizontal whiskers{f'; {esc(device)}' if device else ''}.",
    )
    training = points[0].get("training", {})
    trainings = sorted({len(point.get("seeds", ())) for point in points} - {0})
    facts = [
        str(content["scorer"]),
        str(content.get("protocol", "")),
        *([f"{training['steps']} steps of {training['batch']} pictures"] if "steps" in training else []),
        *([f"{' or '.join(map(str, trainings))} trainings a point"] if trainings[-1:] > [1] else []),
    ]
    skipped = name_skipped(content.get("skipped") or [])
    below = f'<p class="notes">Not applicable: {esc("; ".join(skipped))}.</p>' if skipped else ""
    return (
        f'<article class="card"><header><h3>{esc(name_task(content["task"]))}{ref(source.number)}</h3>'
        f'<p class="facts">{esc("; ".join(filter(None, facts)))}</p></header>'
        f'<ul class="legend">{keys}</ul><div class="pair even">{chart(gmacs, captions[0])}'
        f"{chart(clock, captions[1])}</div>{_points(points, primary)}{below}</article>"
    )


def _points(points: Sequence[Mapping[str, Any]], primary: str) -> str:
    rows = []
    for point in sorted(points, key=lambda point: point["gmacs"]["total"]):
        macs, ms, figure = point["gmacs"], point["ms"], point["figures"][primary]
        name = esc(name_method(point["method"]))
        if point["method"] == OURS:
            name = f"<strong>{name}</strong>"
        cells = [name, str(point["tokens"]), figure_cell(figure), _singles(figure)]
        costs = [short(macs["tower"]), short(macs["total"]), short(ms["total"])]
        rows.append([*cells, _behind(point.get("ours_minus")), f"{figure['n']:,}", *costs])
        if "random-picture" in point:
            floor = point["random-picture"]["figures"][primary]
            cells = [f"{name}, wrong picture", str(point["tokens"]), figure_cell(floor), _singles(floor)]
            rows.append([*cells, "", f"{floor['n']:,}", "", "", ""])
    head = ["tower", "tokens", f"{figure_name(primary)}, %", "single trainings, %", "ours minus it", "n"]
    whole = table([*head, "tower, GMACs", "total, GMACs", "first word, ms"], rows, "figures")
    return f"<details><summary>All {len(rows)} rows</summary>{whole}</details>"


def _singles(figure: Mapping[str, Any]) -> str:
    """The figure of each training, where there are several."""
    single = figure.get("by_seed", ())
    return ", ".join(f"{value:.1f}" for value in single) if len(single) > 1 else "one"


def _behind(figure: Mapping[str, Any] | None) -> str:
    """Ours minus a rival, in points."""
    if figure is None:
        return ""
    ends = f"{signed(figure['low'])} … {signed(figure['high'])}"
    return f'<span class="value">{signed(figure["value"])}</span><span class="interval">{ends}</span>'


def cost_section(sources: Sequence[Source]) -> str:
    """Counts and clocks, a card a record."""
    if not sources:
        return ""
    lead = (
        "What happens until the first token of an answer, with each tower before the same language model. "
        "Ratios refer to the baseline of the same record."
    )
    return section("Cost", lead, "".join(_record(source) for source in sources))


def _record(source: Source) -> str:
    record = source.content
    labels, counts, base = record["labels"], record["counts"], record["counts"][record["baseline"]]
    rows = [
        Bar(
            _with_tokens(labels[name], row["visual_tokens"]),
            tuple((piece, row[f"{piece}_gmacs"], css) for piece, css in _PIECES),
            f"{short(row['total_gmacs'])} GMACs{_times(base['total_gmacs'], row['total_gmacs'])}",
        )
        for name, row in counts.items()
    ]
    caches = [
        Bar(
            labels[name],
            (("keys and values", row["cache_bytes"] / 1e6, "tone-0" if row is base else "tone-1"),),
            f"{short(row['cache_bytes'] / 1e6)} MB{_times(base['cache_bytes'], row['cache_bytes'])}",
        )
        for name, row in counts.items()
    ]
    head = ["tower", "visual tokens", "tower, M parameters", "tower, GMACs", "projector, GMACs"]
    head += ["prefill, GMACs", "total, GMACs", "cache, MB"]
    cells = [
        [
            esc(labels[name]),
            str(row["visual_tokens"]),
            f"{row['tower_parameters'] / 1e6:.0f}",
            short(row["tower_gmacs"]),
            short(row["projector_gmacs"]),
            short(row["prefill_gmacs"]),
            short(row["total_gmacs"]),
            short(row["cache_bytes"] / 1e6),
        ]
        for name, row in counts.items()
    ]
    key = legend([(css, name) for name, css in _PIECES])
    return (
        f'<article class="card"><header><h3>{esc(record["llm"])} Llama{ref(source.number)}</h3>'
        f'<p class="facts">{esc(_describe(source))}</p></header>'
        f'<div class="pair even"><div>{key}{chart(draw_bars(rows, "Multiply-adds", "GMACs"))}</div>'
        f"{chart(draw_bars(caches, 'Cache of keys and values', 'MB of cache after the prompt'))}</div>"
        f"<details><summary>Counts as a table</summary>{table(head, cells, 'figures')}</details>"
        f"{_clocks(record) if record['measured'] else ''}</article>"
    )


def _describe(source: Source) -> str:
    record = source.content
    device = source.provenance.get("device")
    parts = [f"a question of {record['words']} tokens about one picture", f"weights in {record['dtype']}"]
    parts.append(f"measured on {device}" if device and record["measured"] else "counted, not measured")
    if record["compiled"]:
        parts.append("compiled")
    return "; ".join(parts)


def _with_tokens(label: str, tokens: int) -> str:
    """A tower's label with its tokens, where it does not say them itself."""
    return label if label.endswith(f" {tokens}") else f"{label} · {tokens} tokens"


def _times(base: float, value: float) -> str:
    """How many times less, or more, than the baseline; nothing for the baseline itself."""
    return "" if value == base else f" · {say_times(base, value, 2)}"


def _clocks(record: Mapping[str, Any]) -> str:
    """What was measured: a drawing for each batch size, one table for all."""
    labels = record["labels"]
    drawings = ""
    cells = []
    for part in record["measured"]:
        base = part[record["baseline"]]
        bars = [_first_token(labels[name], row, base) for name, row in part.items()]
        drawing = draw_bars(bars, f"Time to the first token, batch {base['batch']}", "ms to the first token")
        drawings += chart(drawing, f"Batch {base['batch']}")
        for name, row in part.items():
            first = [short(1e3 * row["first_token"][key]) for key in ("median", "low", "high")]
            cells.append(
                [
                    esc(labels[name]),
                    str(row["batch"]),
                    _rate(row["see"], row["batch"]),
                    f'{first[0]}<span class="interval">{first[1]} – {first[2]}</span>',
                    _rate(row["decode"], row["batch"]),
                    short(row["peak_bytes"] / 1e9),
                    short(row["cache_bytes"] / 1e6),
                    str(row["first_token"]["rounds"]),
                ]
            )
    head = ["tower", "batch", "pictures/s", "first token, ms", "tokens/s", "peak memory, GB", "cache, MB"]
    what = "Medians, with quartiles below and as whiskers; all towers in turn in every round."
    return (
        f'<h4>Measured</h4><div class="several">{drawings}</div>{table([*head, "rounds"], cells, "figures")}'
        f'<p class="notes">{what}</p>'
    )


def _first_token(label: str, row: Mapping[str, Any], base: Mapping[str, Any]) -> Bar:
    median, low, high = (1e3 * row["first_token"][key] for key in ("median", "low", "high"))
    ratio = _times(base["first_token"]["median"], row["first_token"]["median"])
    css = "tone-0" if row is base else "tone-1"
    return Bar(label, (("first token", median, css),), f"{short(median)} ms{ratio}", low, high)


def _rate(timing: Mapping[str, float], batch: int) -> str:
    """Things a second; the quartiles of the time become theirs."""
    low, high = batch / timing["high"], batch / timing["low"]
    spread = f'<span class="interval">{short(low)} – {short(high)}</span>'
    return f"{short(batch / timing['median'])}{spread}"
