"""The whole answer: time to the first token and questions per second, a ViT's LLaVA against ours."""

from __future__ import annotations

import argparse
from typing import Any

from eval.answers import InputError
from eval.bench.turns import table
from eval.costs.clock import Measured, measure
from eval.costs.count import count_costs
from eval.costs.graphs import graph_tower
from eval.costs.shapes import build_subject, list_llms, list_towers
from sparse_vlm.digits import DigitsError, pack_digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench answer`."""
    parser.add_argument(
        "--tower",
        nargs="+",
        default=["vit_l_14_336", "sf_l_49", "sf_l_64"],
        help=f"the first is what ratios refer to; of {', '.join(list_towers())}, or directories",
    )
    parser.add_argument("--llm", default="0.5b", help=f"{', '.join(list_llms())} (default 0.5b)")
    parser.add_argument("--words", type=int, default=64, help="tokens of a question (default 64)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer (default 16)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="questions at once")
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="towers as CUDA graphs; language models stay as they are",
    )
    parser.add_argument(
        "--digits", type=int, choices=(1, 2, 3), help="towers and language models multiply digits (AMX, fp32)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times first and following tokens of every LLaVA in turn.

    Raises:
        InputError: If one cannot be built.
    """
    if min(*options.batch, options.words, options.answer) < 1:
        raise InputError("--batch, --words and --answer must be at least 1.")
    dtype, device = options.torch_dtype, options.device
    if options.graphs and not device.startswith("cuda"):
        raise InputError("--graphs needs --device cuda.")
    counts = {}
    for name in options.tower:
        counts[name] = count_costs(build_subject(name, options.llm, "meta", dtype), options.words)
    subjects = [build_subject(name, options.llm, device, dtype) for name in options.tower]
    for subject in subjects:
        if options.graphs:
            graph_tower(subject.tower)
        if options.digits is not None:
            try:
                pack_digits(subject.model, options.digits, strict=True)
            except DigitsError as error:
                raise InputError(f"--digits: {error}.") from None
    batches = []
    for batch in options.batch:
        measured = measure(subjects, batch, options.words, options.rounds, device)
        batches.append({"batch": batch, "towers": _describe(measured, options)})
    return {
        "llm": options.llm,
        "digits": options.digits,
        "graphs": options.graphs,
        "words": options.words,
        "answer": options.answer,
        "gmacs": {name: count.total_gmacs for name, count in counts.items()},
        "visual_tokens": {name: count.visual_tokens for name, count in counts.items()},
        "batches": batches,
    }


def _describe(measured: dict[str, Measured], options: argparse.Namespace) -> dict[str, Any]:
    base = measured[options.tower[0]].first_token.median
    return {
        name: {
            "first_token": vars(row.first_token),
            "next_token": vars(row.decode),
            "times_shorter": base / row.first_token.median,
            "questions_a_second": row.batch
            / (row.first_token.median + (options.answer - 1) * row.decode.median),
        }
        for name, row in measured.items()
    }


def show(report: dict[str, Any]) -> str:
    """First token, following tokens, questions per second."""
    base = next(iter(report["gmacs"].values()))
    asked = f"{report['words']} words asked, {report['answer']} tokens answered"
    way = f", {report['digits']} digits" if report["digits"] else ""
    way += ", towers as CUDA graphs" if report["graphs"] else ""
    lines = [f"{report['llm']} Llama{way}, {asked}; wall clock."]
    for part in report["batches"]:
        rows = []
        for name, row in part["towers"].items():
            first = row["first_token"]
            rows.append(
                [
                    name,
                    str(report["visual_tokens"][name]),
                    f"{first['median']:.3g} [{first['low']:.3g}, {first['high']:.3g}]",
                    f"{row['times_shorter']:.2f}",
                    f"{base / report['gmacs'][name]:.2f}",
                    f"{1e3 * row['next_token']['median']:.0f}",
                    f"{row['questions_a_second']:.3g}",
                ]
            )
        head = ["", "tokens", "first token s", "times shorter", "by GMACs", "next ms", "questions/s"]
        lines += [f"\nBatch {part['batch']}", table(head, rows)]
    return "\n".join(lines)
