"""The section about the encoder alone: zero-shot, retrieval, neighbours, probe, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.reports.charts import Span, draw_spans
from eval.reports.inputs import Source
from eval.reports.parts import (
    chart,
    esc,
    figure_cell,
    figure_name,
    notes,
    ref,
    section,
    show_p,
    signed,
    table,
)
from eval.reports.words import name_figure

_NAMES = {
    "zeroshot": "Zero-shot classification",
    "retrieval": "Image-text retrieval",
    "knn": "Nearest neighbours",
    "probe": "Linear probe",
    "agreement": "Agreement with the teacher",
}


def encoder_section(sources: Sequence[Source]) -> str:
    """A card a measurement."""
    if not sources:
        return ""
    lead = "The eyes without a language model, beside the teacher they were made from."
    return section("The encoder alone", lead, "".join(_card(source) for source in sources))


def name_measurement(source: Source) -> str:
    """What was measured, as a heading."""
    command = source.content["command"]
    return _NAMES.get(command, command)


def _card(source: Source) -> str:
    sheet = source.content
    looks: Mapping[str, Mapping[str, Any]] = sheet["figures"]
    names = list(dict.fromkeys(name for part in looks.values() for name in part))
    spans = [
        Span(
            f"{name_figure(name)} · {look}",
            part[name]["value"],
            part[name]["low"],
            part[name]["high"],
            f"{part[name]['value']:.1f} %",
            "tone-0" if look == "teacher" else "tone-1",
        )
        for name in names
        for look, part in looks.items()
        if name in part
    ]
    rows = []
    for name in names:
        counts = sorted({part[name]["n"] for part in looks.values() if name in part})
        made = sheet["differences"].get(name)
        rows.append(
            [
                figure_name(name),
                *(figure_cell(part.get(name)) for part in looks.values()),
                *(["–"] * 3 if made is None else _difference(made)),
                " / ".join(f"{count:,}" for count in counts),
            ]
        )
    head = ["figure, %", *map(esc, looks), "encoder − teacher", "kept", "McNemar", "n"]
    drawing = chart(draw_spans(spans, name_measurement(source), "%"))
    return (
        f'<article class="card"><header><h3>{esc(name_measurement(source))}{ref(source.number)}</h3>'
        f'<p class="facts">{esc(sheet["protocol"])}</p></header>'
        f'<div class="stack">{drawing}{table(head, rows, "figures")}</div>'
        f"{notes(sheet['notes'])}</article>"
    )


def _difference(made: Mapping[str, Any]) -> list[str]:
    """Points, what is kept of the teacher's figure, and McNemar's p."""
    ends = f"{signed(made['low'], 2)} … {signed(made['high'], 2)}"
    points = f'<span class="value">{signed(made["difference"], 2)}</span><span class="interval">{ends}</span>'
    kept = f"{100 * made['second'] / made['first']:.1f} %" if made["first"] else "–"
    p = show_p(made["p"]) if made["p"] is not None else "–"
    return [points, f'<span class="value">{kept}</span>', f'<span class="value">{p}</span>']
