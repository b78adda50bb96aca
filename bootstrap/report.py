"""A run as one HTML page, no network needed: ``python -m bootstrap.report RUN_DIR [-o report.html]``."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sparse_vlm.atomic import write_atomic
from sparse_vlm.checkpoint import PROVENANCE_FILE, load_provenance

from .figures import NAMES, tabulate
from .log import list_distances, read_log

_STYLE = """
:root { --ink: #1b1f24; --soft: #5b6570; --paper: #ffffff; --line: #d9dee3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --paper: #14171a; --line: #333a41; }
  img.chart { filter: invert(0.9) hue-rotate(180deg); } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note { color: var(--soft); }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: right; padding: 0.35rem 0.7rem;
  border-bottom: 1px solid var(--line); } th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; font-size: 0.8rem; color: var(--soft); }
"""

_TITLES = {
    "loss": "loss (weighted sum)",
    "handover": "hand-over tokens",
    "tokens": "final tokens",
    "pooled": "pooled embedding",
    "pooled_cosine": "pooled embedding, 1 - cosine",
    "relations": "relations",
}
_BY_TOKENS = re.compile(r"heldout_(\d+)_tokens")
_HELDOUT = {name: NAMES[name] for name in ("cosine", "agreement", "retrieval", "top1")}


def build_report(run: Path, rows: Sequence[Sequence[str]] = (), note: str = "") -> str:
    """The page of a run directory.

    Args:
        run: written by :mod:`bootstrap.train`.
        rows: a table to put first: head, then lines. By default the held-out figures of the run.
        note: a sentence below it.

    Raises:
        ValueError: if the directory holds no run, or its encoder's provenance is damaged.
    """
    if not (run / "log.jsonl").is_file():
        raise ValueError(f"{run} holds no log.jsonl: name a run directory written by bootstrap.train")
    lines = read_log(run / "log.jsonl")
    if not all("kind" in line for line in lines):
        raise ValueError(f"{run}/log.jsonl is of another command: name a run directory of bootstrap.train")
    provenance: dict[str, Any] = {}
    if (run / "encoder" / PROVENANCE_FILE).is_file():
        provenance = load_provenance(run / "encoder")
    parts = [
        "<h1>A SparseFormer, bootstrapped</h1>",
        f"<p>{html.escape(describe_run(provenance, lines))}</p>",
        _table(rows or _default_rows(provenance, lines)),
        f'<p class="note">{html.escape(note)}</p>' if note else "",
        "<h2>While training</h2>",
        _curves(lines),
    ]
    figures = sorted((run / "figures").glob("rois_*.png")) if (run / "figures").is_dir() else []
    if figures:
        parts.append("<h2>Where the tokens look</h2>")
        chosen = [figures[-1]] if len(figures) == 1 else [figures[0], figures[-1]]
        for figure in chosen:
            step = int(figure.stem.split("_")[1])
            parts.append(
                f"<p>After step {step}:</p>{_image(figure.read_bytes(), 'png', f'RoIs after step {step}')}"
            )
    if provenance:
        text = html.escape(json.dumps(provenance, indent=2))
        parts.append(f"<h2>Provenance</h2><details><summary>everything</summary><pre>{text}</pre></details>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>sparse-vlm: {html.escape(run.name)}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def describe_run(provenance: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """The head of the page: teacher, pictures, steps and tokens, as far as the run has come.

    Args:
        provenance: of the encoder directory; empty where the run is not finished.
        lines: of the run's ``log.jsonl``.
    """
    if not provenance:
        done = max((line["step"] for line in lines), default=0)
        return f"Not finished: {done} steps so far."
    parts = [f"Teacher {provenance['teacher']['name']}"]
    if provenance.get("tokens"):
        parts.append(f"{provenance['tokens']} tokens")
    parts.append(f"{provenance['pictures_seen']:,} pictures seen in {provenance['steps']:,} steps")
    judged = provenance.get("figures", {}).get("pictures")
    if judged:
        parts.append(f"judged on {judged:,} held-out pictures")
    return "; ".join(parts) + "."


def _default_rows(provenance: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Figures of the end; of a run that is not finished, those of its last evaluation."""
    if provenance:
        return tabulate(provenance.get("figures", {}), provenance.get("tokens"))
    scores = [line for line in lines if line["kind"] == "heldout"]
    if not scores:
        return []
    last = scores[-1]["step"]
    found = {
        match[1]: line
        for line in lines
        if line["step"] == last and (match := _BY_TOKENS.fullmatch(line["kind"]))
    }
    return tabulate({**scores[-1], "by_tokens": found})


def _table(rows: Sequence[Sequence[str]]) -> str:
    if len(rows) < 2:
        return (
            '<p class="note">No held-out figures: there was no evaluation yet, or no held-out pictures.</p>'
        )

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="wide"><table><thead>{line(rows[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def draw_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Distances from the teacher and, where there are several, held-out figures over steps.

    Args:
        lines: of a run's ``log.jsonl``.
    """
    train = [line for line in lines if line["kind"] == "train"]
    heldout = [line for line in lines if line["kind"] == "heldout"]
    counts = sorted({int(found[1]) for line in lines if (found := _BY_TOKENS.fullmatch(line["kind"]))})
    panels: list[Callable[[Axes], None]] = [lambda axes: _draw_distances(axes, train)]
    if len(heldout) > 1:
        panels.append(lambda axes: _draw_heldout(axes, heldout))
        if counts:
            panels.append(lambda axes: _draw_by_tokens(axes, lines, counts))
    figure = Figure(figsize=(8.4, 3.2 * len(panels)), layout="constrained")
    for axes, draw in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        draw(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_distances(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    found = dict.fromkeys(name for line in lines for name in list_distances(line))
    _draw_lines(axes, lines, {**_TITLES, **{name: _TITLES.get(name, name) for name in found}})
    axes.set_yscale("log")
    axes.set_ylabel("distance from the teacher")


def _draw_heldout(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    _draw_lines(axes, lines, _HELDOUT, marker="o")
    axes.set_ylim(0, 1)
    axes.set_ylabel("held-out: share, or cosine")


def _draw_by_tokens(axes: Axes, lines: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> None:
    """Label agreement, or where the teacher names no classes retrieval, a curve per token count."""
    rows = {count: [line for line in lines if line["kind"] == f"heldout_{count}_tokens"] for count in counts}
    named = any("agreement" in line for of_count in rows.values() for line in of_count)
    figure = "agreement" if named else "retrieval"
    for count, of_count in rows.items():
        _draw_lines(axes, of_count, {figure: f"{count} tokens"}, marker="o")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(_HELDOUT[figure])


def _draw_lines(
    axes: Axes, lines: Sequence[Mapping[str, Any]], titles: Mapping[str, str], marker: str | None = None
) -> None:
    for name, title in titles.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            dot = marker or ("o" if len(points) == 1 else None)  # one point is no line
            axes.plot(*zip(*points, strict=True), label=title, linewidth=1.6, marker=dot)


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.BytesIO()
    draw_curves(lines).savefig(buffer, format="svg", transparent=True)
    return _image(buffer.getvalue(), "svg+xml", "curves over steps", "chart")


def _image(data: bytes, kind: str, alt: str, css: str = "") -> str:
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img class="{css}" alt="{html.escape(alt)}" src="data:image/{kind};base64,{encoded}">'


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bootstrap.report", description="A run as one HTML page.")
    parser.add_argument("run", type=Path, help="run directory of bootstrap.train")
    parser.add_argument(
        "-o", "--out", type=Path, help="file to write; by default report.html in the run directory"
    )
    parser.add_argument("--chart", type=Path, help="also write the curves alone, as a PNG or SVG file")
    options = parser.parse_args(arguments)
    try:
        page = build_report(options.run)
        if options.chart:
            lines = read_log(options.run / "log.jsonl")
            write_atomic(options.chart, lambda path: draw_curves(lines).savefig(path, dpi=130))
        out = options.out or options.run / "report.html"
        write_atomic(out, page)
    except (ValueError, OSError) as error:
        raise SystemExit(f"report: {error}") from None
    print(out)


if __name__ == "__main__":
    main()
