"""The section of example questions: photograph, RoIs over it, every model's answer and the gold one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.reports.benchmarks import tones
from eval.reports.content import Benchmark
from eval.reports.examples import Group, Shown
from eval.reports.eyes import Eyes, Look
from eval.reports.inputs import Source
from eval.reports.parts import anchor, embed, esc, section
from eval.reports.svg import number
from eval.reports.words import name_task

_LAYERS = 6  # looks that the style sheet knows


def gallery_section(benchmarks: Sequence[Benchmark], eyes: Mapping[int, Eyes]) -> str:
    """Examples of all benchmarks; empty where there are none.

    Args:
        benchmarks: With their groups.
        eyes: Of runs whose tower is a SparseFormer, by the run's number.
    """
    body = "".join(_of_benchmark(benchmark, eyes) for benchmark in benchmarks if benchmark.groups)
    if not body:
        return ""
    lead = (
        "Drawn by lot (seed 0) from each outcome, right and wrong alike; the number beside a heading says "
        "how many questions went that way. A soft score counts as right from one half on."
    )
    return section("Examples", lead, body)


def _of_benchmark(benchmark: Benchmark, eyes: Mapping[int, Eyes]) -> str:
    runs = {run.number: run for run in benchmark.runs}
    lookers = [number for number in runs if number in eyes][: _LAYERS // 2]
    task, name = name_task(benchmark.task), f"look-{anchor(benchmark.task)}"
    layers = [
        f"{runs[looker].label}, {step}" if len(lookers) > 1 else step
        for looker in lookers
        for step in ("first look", "last look")
    ]
    groups = "".join(_group(group, runs, lookers, eyes) for group in benchmark.groups)
    return (
        f'<div class="gallery" role="group" aria-label="Examples of {esc(task)}">'
        f"<h3>{esc(task)}</h3>{_switch(name, layers)}{groups}</div>"
    )


def _switch(name: str, layers: Sequence[str]) -> str:
    """Radio buttons that show one layer over all photographs; no script."""
    if not layers:
        return ""
    buttons = []
    for place, label in enumerate(["photograph", *layers]):
        checked = " checked" if place == len(layers) else ""
        buttons.append(
            f'<input type="radio" class="pick pick-{place}" name="{name}" id="{name}-{place}"{checked}>'
            f'<label for="{name}-{place}">{esc(label)}</label>'
        )
    return f'<span class="switch-name">Regions of interest</span>{"".join(buttons)}'


def _group(group: Group, runs: Mapping[int, Source], lookers: Sequence[int], eyes: Mapping[int, Eyes]) -> str:
    cards = "".join(_card(shown, runs, lookers, eyes) for shown in group.shown)
    return (
        f'<div class="outcome"><h4>{esc(group.name)} <span class="count">{group.of:,}</span></h4>'
        f'<div class="cards">{cards}</div></div>'
    )


def _card(shown: Shown, runs: Mapping[int, Source], lookers: Sequence[int], eyes: Mapping[int, Eyes]) -> str:
    colours = tones(list(runs.values()))
    answers = "".join(
        f'<div class="answer {colours[given.source]}"><dt>{esc(runs[given.source].label)}</dt>'
        f'<dd dir="auto">{_mark(given.score)}{esc(given.text) or "<em>nothing</em>"}</dd></div>'
        for given in shown.answers
    )
    choices = (
        "<ol class='choices' type='A'>"
        + "".join(f"<li>{esc(choice)}</li>" for choice in shown.choices)
        + "</ol>"
        if shown.choices
        else ""
    )
    gold = " / ".join(esc(answer) for answer in shown.gold[:6]) or "on a server"
    if len(shown.gold) > 6:
        gold += f" and {len(shown.gold) - 6} more"
    return (
        f'<article class="card example" id="example-{anchor(shown.key)}">{_picture(shown, lookers, eyes)}'
        f'<p class="question" dir="auto">{esc(shown.question)}</p>{choices}'
        f'<dl>{answers}<div class="answer gold"><dt>gold</dt><dd dir="auto">{gold}</dd></div></dl></article>'
    )


def _mark(score: float | None) -> str:
    if score is None:
        return ""
    if score in (0, 1):
        right = score == 1
        return f'<span class="mark {"right" if right else "wrong"}">{"right" if right else "wrong"}</span>'
    return f'<span class="mark {"right" if score >= 0.5 else "wrong"}">{score:.2g}</span>'


def _picture(shown: Shown, lookers: Sequence[int], eyes: Mapping[int, Eyes]) -> str:
    if shown.picture is None:
        return '<p class="no-picture">asked without a picture</p>'
    width, height = shown.picture.size
    layers = []
    for place, looker in enumerate(lookers):
        look = eyes[looker].look(shown.picture)
        layers += [_layer(look, step, 2 * place + step + 1, width, height) for step in range(2)]
    label = f"The photograph {shown.image}" + (" with regions of interest" if layers else "")
    return (
        f'<svg class="photo" viewBox="0 0 {width} {height}" role="img" aria-label="{esc(label)}">'
        f'<image href="{embed(shown.picture)}" width="{width}" height="{height}"/>{"".join(layers)}</svg>'
    )


def _layer(look: Look, step: int, place: int, width: int, height: int) -> str:
    """One look's RoIs, and a veil over what the encoder does not see."""
    made: Any = look.steps[step]
    x, y, w, h = (v * side for v, side in zip(look.crop, (width, height) * 2, strict=True))
    veil = f'<path class="veil" d="M0 0H{width}V{height}H0z"/>'
    if w < width - 0.5 or h < height - 0.5:
        hole = f"M{number(x)} {number(y)}v{number(h)}h{number(w)}v-{number(h)}z"
        veil += f'<path class="veil unseen" d="M0 0H{width}V{height}H0z{hole}"/>'
    boxes = "".join(
        f'<rect x="{number(bx * width)}" y="{number(by * height)}" width="{number(bw * width)}" '
        f'height="{number(bh * height)}" stroke="{colour}"/>'
        for (bx, by, bw, bh), colour in zip(made.boxes, made.colours, strict=True)
    )
    note = f"{len(made.boxes)} regions" + (f", and {made.whole} that see all" if made.whole else "")
    return f'<g class="rois layer-{place}"><title>{made.name}: {note}</title>{veil}{boxes}</g>'
