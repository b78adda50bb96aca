"""What a training step costs with one tower and with another.

python -m eval.cost_train --model sf_l_49 --baseline vit_l_14_336 --llm 7b --batch 1 8 32 --dtype bf16
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Sequence
from typing import Any

from eval.answers import InputError
from eval.cost import append_record
from eval.costs.options import DTYPES, add_cost_options
from eval.costs.shapes import build_subject, label_subjects
from eval.costs.train_step import measure_steps
from eval.device import choose_device
from eval.outputs import check_output
from eval.provenance import describe_origin

STAGES = ("align", "lora", "tune")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m eval.cost_train", description=__doc__.split("\n")[0])
    add_cost_options(parser, rounds=5, dtypes=("fp32", "bf16"))
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=["align", "lora"], help="what is trained"
    )
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer (default 64)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    options = parser.parse_args(words)
    try:
        check_output(options.json, "--json")
        options.device = str(choose_device(options.device, "--device "))
        report = run(options)
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        report["provenance"] = describe_origin("eval.cost_train", words, settings, options.device)
        print(format_steps(report))
        if options.json is not None:
            append_record(options.json, report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what the options name, one tower after the other.

    Raises:
        InputError: If something cannot be built.
    """
    if min(*options.batch, options.rounds, options.words, options.answer) < 1:
        raise InputError("--batch, --rounds, --words and --answer must be at least 1.")
    dtype = DTYPES[options.dtype]
    names = list(dict.fromkeys([options.baseline, *options.model]))
    for name in names:
        build_subject(name, options.llm, "meta", dtype)  # what cannot be built is said before anything runs
    labels = label_subjects(names)
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for stage in options.stage:
        for name in names:
            print(f"{labels[name]}, {stage} …", file=sys.stderr, flush=True)
            subject = build_subject(name, options.llm, options.device, dtype)
            costs = measure_steps(
                subject,
                stage,
                options.batch,
                options.words,
                options.answer,
                options.rounds,
                options.device,
                options.checkpointing,
            )
            steps[name] += [dataclasses.asdict(cost) for cost in costs]
            del subject
            gc.collect()
    return {
        "llm": options.llm,
        "dtype": options.dtype,
        "baseline": options.baseline,
        "labels": labels,
        "steps": steps,
    }


def format_steps(report: dict[str, Any]) -> str:
    """The table of step times: medians, quartiles, and the ratio to the baseline of the same run."""
    lines = [
        f"Median seconds of a training step, quartiles in brackets; {report['llm']} Llama, "
        f"{report['provenance']['device']}, {report['dtype']}.",
        f"{'':26}{'stage':>7}{'batch':>7}{'tokens':>8}{'trained M':>11}{'step':>28}{'times less':>12}"
        f"{'peak GB':>9}",
    ]
    for name, rows in report["steps"].items():
        for row, base in zip(rows, report["steps"][report["baseline"]], strict=True):
            spread, ratio = "does not fit", ""
            if row["step"] is not None:
                step = row["step"]
                spread = f"{step['median']:.4g} [{step['low']:.4g}, {step['high']:.4g}]"
                if base["step"] is not None:
                    ratio = f"{base['step']['median'] / step['median']:.2f}x"
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
            lines.append(
                f"{report['labels'][name]:<26}{row['stage']:>7}{row['batch']:>7}{row['tokens']:>8}"
                f"{row['trained'] / 1e6:>11.1f}{spread:>28}{ratio:>12}{peak:>9}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
