"""The report in Markdown: the same figures as tables, for a repository or a review."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.baselines.combine import OURS
from eval.baselines.table import name_method
from eval.reports import words
from eval.reports.benchmarks import describe_comparison, name_run
from eval.reports.content import Benchmark, Content, protocol_of
from eval.reports.encoders import name_measurement
from eval.reports.inputs import Source
from eval.reports.parts import signed
from eval.reports.scatter import name_skipped
from eval.reports.svg import short


def build_markdown(content: Content) -> str:
    """The whole report; numbers in brackets refer to its last table."""
    made = f"Made {content.origin['date'][:10]} at commit `{content.origin['commit']}`."
    parts = [f"# {_plain(content.title)}", made]
    for benchmark in content.benchmarks:
        parts += _benchmark(benchmark)
    for source in content.of("pareto"):
        parts += [
            f"## Accuracy against cost: {_plain(words.name_task(source.content['task']))} [{source.number}]",
            _pareto(source),
        ]
    for source in content.of("cost"):
        parts += _cost(source)
    for source in content.of("encoder"):
        parts += [f"## {name_measurement(source)} [{source.number}]", _plain(source.content["protocol"])]
        parts.append(_encoder(source.content))
        parts += [_plain(note) for note in source.content["notes"]]
    parts += ["## Where the figures come from", _origins(content)]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines)


def _plain(text: object) -> str:
    """Text in one line, with everything that Markdown would read escaped."""
    line = " ".join(str(text).split())
    for sign in "\\`*_[]|<>#~":
        line = line.replace(sign, f"\\{sign}")
    return line


def _code(text: object) -> str:
    return "`" + str(text).replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:.2f} (interval undefined)"
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _benchmark(benchmark: Benchmark) -> list[str]:
    runs = {run.number: run for run in benchmark.runs}
    names: dict[str, Mapping[str, Any]] = {}
    for run in benchmark.runs:
        for name, figure in run.content["figures"].items():
            if not figure["detail"]:
                names.setdefault(name, figure)
    head = ["figure", *(f"{_plain(name_run(run))} [{run.number}]" for run in benchmark.runs), "n", "rule"]
    rows = []
    for name, any_figure in sorted(names.items(), key=lambda item: item[0] != benchmark.primary):
        figures = [run.content["figures"].get(name) for run in benchmark.runs]
        counts = sorted({figure["n"] for figure in figures if figure})
        rule = ", ".join(filter(None, (any_figure["protocol"], words.name_interval(any_figure["method"]))))
        unit = "%" if any_figure["unit"] == "%" else any_figure["unit"]
        n = " / ".join(map(str, counts))
        rows.append([f"{_plain(words.name_figure(name))}, {unit}", *map(_figure, figures), n, _plain(rule)])
    tokens = [
        f"{name_run(run)}: {run.content['visual_tokens']:.0f} visual tokens, "
        f"{words.name_prompts(protocol_of(run))}"
        for run in benchmark.runs
        if run.content.get("visual_tokens") is not None
    ]
    task = _plain(words.name_task(benchmark.task))
    parts = [f"## {task}", _plain(benchmark.scorer) + "."]
    if rows:
        parts.append(_table(head, rows))
    if tokens:
        parts.append(_plain("; ".join(tokens) + "."))
    said = [describe_comparison(made, runs) for made in benchmark.comparisons] + list(benchmark.notes)
    if said:
        parts.append("\n".join(f"- {_plain(line)}" for line in said))
    if benchmark.groups:
        parts += [f"### Examples: {task}", _examples(benchmark, runs)]
    return parts


def _examples(benchmark: Benchmark, runs: Mapping[int, Source]) -> str:
    asked = [given.source for given in benchmark.groups[0].shown[0].answers]
    head = ["outcome", "picture", "question", *(_plain(runs[number].label) for number in asked), "gold"]
    rows = [
        [
            f"{_plain(group.name)} ({group.of})",
            _plain(shown.image or "none"),
            _plain(shown.question),
            *(_plain(given.text[:200]) or "(nothing)" for given in shown.answers),
            _plain(" / ".join(shown.gold[:6])) or "(on a server)",
        ]
        for group in benchmark.groups
        for shown in group.shown
    ]
    return _table(head, rows)


def _pareto(source: Source) -> str:
    primary = source.content["primary"]
    rows = [
        [
            f"**{name_method(p['method'])}**" if p["method"] == OURS else name_method(p["method"]),
            str(p["tokens"]),
            _figure(p["figures"][primary]),
            str(p["figures"][primary]["n"]),
            short(p["gmacs"]["total"]),
            short(p["ms"]["total"]),
        ]
        for p in sorted(source.content["points"], key=lambda p: p["gmacs"]["total"])
    ]
    head = [
        "tower",
        "tokens",
        f"{_plain(words.name_figure(primary))}, %",
        "n",
        "total, GMACs",
        "first word, ms",
    ]
    skipped = name_skipped(source.content.get("skipped") or [])
    return _table(head, rows) + (f"\n\nNot applicable: {_plain('; '.join(skipped))}." if skipped else "")


def _cost(source: Source) -> list[str]:
    record = source.content
    base = record["counts"][record["baseline"]]
    rows = [
        [
            _plain(record["labels"][name]),
            str(row["visual_tokens"]),
            f"{row['tower_parameters'] / 1e6:.0f}",
            short(row["tower_gmacs"]),
            short(row["prefill_gmacs"]),
            short(row["total_gmacs"]),
            f"{base['total_gmacs'] / row['total_gmacs']:.2f}×",
            short(row["cache_bytes"] / 1e6),
        ]
        for name, row in record["counts"].items()
    ]
    head = [
        "tower",
        "tokens",
        "tower, M",
        "tower, GMACs",
        "prefill, GMACs",
        "total, GMACs",
        "less",
        "cache, MB",
    ]
    about = f"A question of {record['words']} tokens about one picture, {record['dtype']}."
    parts = [f"## Cost: {record['llm']} Llama [{source.number}]", about, _table(head, rows)]
    if record["measured"]:
        parts.append(_clocks(record))
    return parts


def _clocks(record: Mapping[str, Any]) -> str:
    rows = []
    for part in record["measured"]:
        base = part[record["baseline"]]["first_token"]["median"]
        for name, row in part.items():
            first = row["first_token"]
            low, high = short(1e3 * first["low"]), short(1e3 * first["high"])
            rows.append(
                [
                    _plain(record["labels"][name]),
                    str(row["batch"]),
                    short(row["batch"] / row["see"]["median"]),
                    f"{short(1e3 * first['median'])} ({low} to {high})",
                    f"{base / first['median']:.2f}×",
                    short(row["batch"] / row["decode"]["median"]),
                    short(row["peak_bytes"] / 1e9),
                ]
            )
    head = ["tower", "batch", "pictures/s", "first token, ms (quartiles)", "less", "tokens/s", "peak, GB"]
    return _table(head, rows)


def _encoder(sheet: Mapping[str, Any]) -> str:
    looks: Mapping[str, Mapping[str, Any]] = sheet["figures"]
    names = dict.fromkeys(name for part in looks.values() for name in part)
    rows = []
    for name in names:
        made = sheet["differences"].get(name)
        ends = f" ({signed(made['low'], 2)} to {signed(made['high'], 2)})" if made else ""
        gap = f"{signed(made['difference'], 2)}{ends}" if made else "–"
        n = " / ".join(str(part[name]["n"]) for part in looks.values() if name in part)
        rows.append(
            [_plain(words.name_figure(name)), *(_figure(part.get(name)) for part in looks.values()), gap, n]
        )
    return _table(["figure, %", *map(_plain, looks), "encoder − teacher", "n"], rows)


def _origins(content: Content) -> str:
    rows = []
    for source in content.sources:
        origin = source.provenance
        digest = origin.get("config_sha256")
        rows.append(
            [
                f"[{source.number}]",
                _plain(source.label),
                _code(origin["command"]) if origin.get("command") else "not recorded",
                _code(origin["commit"]) if origin.get("commit") else "not recorded",
                _code(digest) if digest else "not recorded",
                _plain(origin.get("device") or "–"),
                _plain(origin.get("date") or "–"),
            ]
        )
    return _table(["", "source", "command", "commit", "configuration (SHA-256)", "device", "date"], rows)
