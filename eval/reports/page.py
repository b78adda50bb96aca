"""The report as one HTML page: no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.reports.benchmarks import benchmark_section, exchange_section
from eval.reports.content import Content
from eval.reports.costs import cost_section, pareto_section
from eval.reports.encoders import encoder_section
from eval.reports.eyes import Eyes
from eval.reports.gallery import gallery_section
from eval.reports.inputs import KINDS, Source
from eval.reports.parts import anchor, esc, section, signed, table
from eval.reports.svg import short
from eval.reports.words import name_task, say_times

_STYLE = Path(__file__).with_name("style.css")
# Nothing may be loaded: what a browser shows is what the file holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def build_page(content: Content, eyes: Mapping[int, Eyes]) -> str:
    """The whole page.

    Args:
        content: What it says.
        eyes: Of runs whose tower is a SparseFormer, by the run's number; their RoIs are drawn.
    """
    parts = {
        "Benchmarks": benchmark_section(content.benchmarks) if content.benchmarks else "",
        "Paired comparisons": exchange_section(content.benchmarks),
        "Accuracy against cost": pareto_section(content.of("pareto")),
        "Cost": cost_section(content.of("cost")),
        "The encoder alone": encoder_section(content.of("encoder")),
        "Examples": gallery_section(content.benchmarks, eyes),
        "Where the figures come from": _provenance(content),
    }
    there = {title: html for title, html in parts.items() if html}
    links = "".join(f'<a href="#{anchor(title)}">{esc(title)}</a>' for title in there)
    style = _STYLE.read_text(encoding="utf-8")
    made = f"made {content.origin['date'][:10]} at commit {content.origin['commit']}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{esc(content.title)}</title><style>\n{style}</style></head>\n'
        '<body><header class="top"><p class="eyebrow">sparse-vlm · evaluation</p>'
        f"<h1>{esc(content.title)}</h1>"
        f'<p class="facts">{esc(made)}, from {len(content.sources)} sources</p>{_summary(content)}</header>'
        f"<nav>{links}</nav>\n<main>{''.join(there.values())}</main></body></html>\n"
    )


def _summary(content: Content) -> str:
    """What one would like to know first, each with its interval."""
    tiles = []
    for benchmark in content.benchmarks:
        runs = {run.number: run for run in benchmark.runs}
        for made in benchmark.comparisons:
            if made["what"] == "towers":
                tiles.append(
                    _tile(
                        f"{name_task(benchmark.task)} score",
                        f"{signed(made['difference'])} points",
                        _words(made, runs),
                    )
                )
    for source in content.of("cost"):
        tiles += _cost_tiles(source)
    tiles = list(dict.fromkeys(tiles))[:8]  # records of several batch sizes count the same
    across = "thirds" if len(tiles) in (3, 5, 6) else "quarters"
    return f'<div class="tiles {across}">{"".join(tiles)}</div>' if tiles else ""


def _words(made: Mapping[str, Any], runs: Mapping[int, Source]) -> str:
    """What a comparison's tile says below its figure."""
    first, second = (runs[number] for number in made["runs"])
    counts = [run.content.get("visual_tokens") for run in (first, second)]
    tokens = "" if None in counts else f" {counts[0]:.0f} → {counts[1]:.0f} visual tokens."
    open_end = ": no difference shown" if made["low"] <= 0 <= made["high"] else ""
    interval = f"95 % {signed(made['low'])} to {signed(made['high'])}{open_end}, n = {made['n']:,}"
    return f"{second.label} instead of {first.label}; {interval}.{tokens}"


def _cost_tiles(source: Source) -> list[str]:
    """Of the cheapest tower."""
    record = source.content
    others = sorted(record["counts"].keys() - {record["baseline"]})
    others.sort(key=lambda name: record["counts"][name]["total_gmacs"])
    if not others:
        return []
    base, ours = record["counts"][record["baseline"]], record["counts"][others[0]]
    pair = f"{record['labels'][others[0]]} instead of {record['labels'][record['baseline']]}"
    device = source.provenance.get("device")
    tiles = [
        _tile(
            f"multiply-adds, {record['llm']} Llama",
            say_times(base["total_gmacs"], ours["total_gmacs"], 1),
            f"{pair}: {short(base['total_gmacs'])} → {short(ours['total_gmacs'])} GMACs to the first token.",
        )
    ]
    for part in record["measured"][:1]:
        slow, fast = part[record["baseline"]]["first_token"], part[others[0]]["first_token"]
        tiles.append(
            _tile(
                f"first token, {record['llm']} Llama",
                say_times(slow["median"], fast["median"], 1, "sooner", "later"),
                f"{pair}: {short(1e3 * slow['median'])} → {short(1e3 * fast['median'])} ms, "
                f"batch {part[others[0]]['batch']}{f', {device}' if device else ''}.",
            )
        )
    return tiles


def _tile(name: str, figure: str, words: str) -> str:
    return (
        f'<div class="tile"><p class="name">{esc(name)}</p><p class="big">{esc(figure)}</p>'
        f"<p>{esc(words)}</p></div>"
    )


def _provenance(content: Content) -> str:
    rows = [_origin_row(source) for source in content.sources]
    head = ["", "command", "commit", "configuration", "device", "date"]
    origin = content.origin
    lead = (
        "The small numbers in this page refer to these rows. The configuration is the SHA-256 of the "
        "settings, its first twelve digits; the whole one shows under the pointer, and stands in the JSON "
        "form of this report."
    )
    own = f"<code>{esc(origin['command'])}</code>, commit {esc(origin['commit'])}"
    page = f'<p class="notes">This page: {own}.</p>'
    return section("Where the figures come from", lead, table(head, rows, "origins") + page)


def _origin_row(source: Source) -> list[str]:
    number = f'<span id="source-{source.number}" class="number">{source.number}</span>'
    name = f'<strong>{esc(source.label)}</strong><span class="sub">{esc(source.path)}</span>'
    origin = source.provenance
    if not origin:
        by = f"by {KINDS[source.kind]}; no provenance was recorded"
        return [number, f'{name}<span class="none">{esc(by)}</span>', *["–"] * 4]
    versions = ", ".join(f"{package} {version}" for package, version in origin["versions"].items())
    digest = origin["config_sha256"]
    return [
        number,
        f'{name}<code>{esc(origin["command"])}</code><span class="sub">{esc(versions)}</span>',
        f"<code>{esc(origin['commit'])}</code>",
        f'<code title="{esc(digest)}">{esc(digest[:12])}</code>',
        esc(origin["device"] or "none: counted"),
        esc(origin["date"].replace("T", " ").removesuffix("+00:00")),
    ]
