"""What a LLaVA costs, and what it would cost with another tower, in the same run.

python -m eval.cost --model sf_l_49 --model sf_l_64 --baseline vit_l_14_336 --llm 7b --count-only
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.answers import InputError, read_text
from eval.costs.clock import Measured, measure
from eval.costs.count import Counts, count_costs
from eval.costs.options import DTYPES, add_cost_options
from eval.costs.shapes import Subject, build_subject, label_subjects
from eval.device import choose_device
from eval.outputs import check_output, write_output
from eval.provenance import describe_origin

_CLOCKS = ("see", "first_token", "decode")
_TOWER_CLOCKS = ("see",)
_OTHER_LLM = "other LLM"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        check_output(options.json, "--json")
        if not options.count_only:
            options.device = str(choose_device(options.device, "--device "))
        report = run(options)
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        device = None if options.count_only else options.device
        report["provenance"] = describe_origin("eval.cost", words, settings, device)
        print(format_counts(report))
        if report["measured"]:
            print("\n" + format_measured(report))
        if options.json is not None:
            append_record(options.json, report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.cost", description=__doc__.split("\n")[0])
    add_cost_options(parser, rounds=7)
    parser.add_argument("--compile", action="store_true", help="compile tower and language model")
    parser.add_argument("--count-only", action="store_true", help="no clock, no weights, no memory")
    return parser


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Counts and measures what the options name.

    Raises:
        InputError: If something cannot be built.
    """
    if min(*options.batch, options.rounds, options.words) < 1:
        raise InputError("--batch, --rounds and --words must be at least 1.")
    names = list(dict.fromkeys([options.baseline, *options.model]))
    dtype = DTYPES[options.dtype]
    counts: dict[str, Counts] = {}
    for name in names:
        counts[name] = count_costs(build_subject(name, options.llm, "meta", dtype), options.words)
    labels = label_subjects(names)
    measured: list[dict[str, Measured]] = []
    if not options.count_only:
        subjects: list[Subject] = []
        for name in names:
            # One language model serves all: its weights do not matter, and the memory is needed.
            subjects.append(build_subject(name, options.llm, options.device, dtype, subjects[:1]))
        measured = [
            measure(subjects, batch, options.words, options.rounds, options.device, options.compile)
            for batch in options.batch
        ]
    return {
        "llm": options.llm,
        "words": options.words,
        "dtype": options.dtype,
        "compiled": options.compile,
        "baseline": options.baseline,
        "labels": labels,
        "counts": {
            name: {**dataclasses.asdict(count), "total_gmacs": count.total_gmacs}
            for name, count in counts.items()
        },
        "measured": [
            {name: dataclasses.asdict(timing) for name, timing in part.items()} for part in measured
        ],
    }


def _same_llm(report: dict[str, Any], name: str) -> bool:
    """Whether a ratio to the baseline would be that of the towers: a LLaVA brings its own language model."""
    counts = report["counts"]
    return bool(counts[name]["llm_parameters"] == counts[report["baseline"]]["llm_parameters"])


def _short(value: float, digits: int = 0) -> str:
    """So many decimals, and of small values three figures."""
    return f"{value:.{digits}f}" if value >= 10 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def _name_llm(report: dict[str, Any]) -> str:
    """The one that towers are put before, and whether LLaVA directories bring their own."""
    own = [name for name in report["counts"] if (Path(name) / "processor_config.json").is_file()]
    if len(own) == len(report["counts"]):
        return "the directories' own"
    return f"{report['llm']} Llama" + (", and the LLaVA directories' own" if own else "")


def format_counts(report: dict[str, Any]) -> str:
    """The table of counts, with the ratio to the baseline."""
    base = report["counts"][report["baseline"]]
    lines = [
        f"One question of {report['words']} tokens about one picture; language model: {_name_llm(report)}; "
        f"GMACs until the first token; cache in {report['dtype']}.",
        f"{'':26}{'tokens':>7}{'tower M':>9}{'tower':>9}{'projector':>11}{'prefill':>10}{'total':>10}"
        f"{'times less':>12}{'cache MB':>10}",
    ]
    for name, row in report["counts"].items():
        ratio = f"{base['total_gmacs'] / row['total_gmacs']:.2f}x" if _same_llm(report, name) else _OTHER_LLM
        lines.append(
            f"{report['labels'][name]:<26}{row['visual_tokens']:>7}{_short(row['tower_parameters'] / 1e6):>9}"
            f"{_short(row['tower_gmacs'], 1):>9}{_short(row['projector_gmacs'], 1):>11}"
            f"{_short(row['prefill_gmacs']):>10}{_short(row['total_gmacs']):>10}{ratio:>12}"
            f"{_short(row['cache_bytes'] / 1e6):>10}"
        )
    return "\n".join(lines)


def format_measured(report: dict[str, Any]) -> str:
    """The table of times: medians, quartiles, and ratios to the baseline of the same run."""
    base_label = report["labels"][report["baseline"]]
    lines = [
        f"Medians, quartiles of seconds in brackets, and how many times faster than {base_label}; "
        f"{report['provenance']['device']}, {report['dtype']}{', compiled' if report['compiled'] else ''}.",
        f"{'':26}{'batch':>6}{'pictures/s':>12}{'':8}{'first token':>28}{'':8}{'tokens/s':>10}{'':8}"
        f"{'peak GB':>9}",
    ]
    for part in report["measured"]:
        base = part[report["baseline"]]
        for name, row in part.items():
            first = row["first_token"]
            known = _CLOCKS if _same_llm(report, name) else _TOWER_CLOCKS
            times = {
                key: f"{base[key]['median'] / row[key]['median']:>7.2f}x" if key in known else f"{'':>8}"
                for key in _CLOCKS
            }
            spread = f"{first['median']:.4g} [{first['low']:.4g}, {first['high']:.4g}]"
            pictures, words = (row["batch"] / row[key]["median"] for key in ("see", "decode"))
            lines.append(
                f"{report['labels'][name]:<26}{row['batch']:>6}{pictures:>12.1f}{times['see']}"
                f"{spread:>28}{times['first_token']}{words:>10.1f}{times['decode']}"
                f"{row['peak_bytes'] / 1e9:>9.2f}"
            )
    return "\n".join(lines)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a file of JSON lines, in one step.

    Raises:
        InputError: If it cannot be written.
    """
    before = read_text(path) if path.is_file() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    write_output(path, before + json.dumps(record) + "\n", "--json")


if __name__ == "__main__":
    sys.exit(main())
