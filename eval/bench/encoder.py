"""Encoder inference: ours, the official SparseFormer with the same weights, and ViTs, in turn."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.answers import InputError
from eval.bench.rivals import Candidate, build_official, build_ours, build_vit, count_gmacs
from eval.bench.turns import Laps, format_spread, has_bf16, matrix_product, ratio, table, take_turns
from sparse_vlm import SparseFormer
from sparse_vlm.digits import pack_digits, what_is_missing
from sparse_vlm.graphed_calls import GraphedCalls
from sparse_vlm.packed import pack_linears

MATRIX = "matrix product"
# Largest difference of the outputs that is rounding, in fractions of the largest output.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# The same for ways to run ours that are less precise than its weights.
_OWN_TOLERANCE = {"bf16": 5e-2, "bf16 packed": 5e-2, "bf16 compiled": 5e-2, "2 digits": 1e-3, "1 digit": 1e-1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench encoder`."""
    parser.add_argument("--preset", default="sparseformer_btsp_augreg_base", help="our architecture")
    parser.add_argument("--official", type=Path, help="a checkout of github.com/showlab/sparseformer")
    parser.add_argument(
        "--rival", action="append", default=[], help="LIBRARY:VIT, for instance open_clip:ViT-L-14-336"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ours compiled too (on a CPU with frozen weights): needs a C++ compiler and some minutes",
    )
    parser.add_argument(
        "--autotune",
        action="store_true",
        help="on a GPU: ours compiled with the fastest kernels found, too",
    )
    parser.add_argument(
        "--rival-graphs", action="store_true", help="on a GPU: rivals and official code as CUDA graphs, too"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times every candidate at every batch size.

    Raises:
        InputError: If a candidate cannot be built, or the official outputs are not ours.
    """
    device, dtype = options.device, options.torch_dtype
    if min(options.batch) < 1:
        raise InputError("--batch must be at least 1.")
    if (options.autotune or options.rival_graphs) and not device.startswith("cuda"):
        raise InputError("--autotune and --rival-graphs need --device cuda.")
    ours = build_ours(options.preset)
    candidates, differences = _build(options, ours)
    parts = []
    with torch.inference_mode():
        for batch in options.batch:
            if options.compile or options.autotune:
                # Beyond a few shapes nothing more is compiled; every batch size begins anew.
                torch.compiler.reset()
            works: dict[str, Callable[[], Any]] = {}
            for candidate in candidates:
                works[candidate.name] = _work(candidate, batch, device, dtype)
            product, operations = matrix_product(device, dtype)
            works[MATRIX] = product
            laps = take_turns(works, options.rounds, device)
            parts.append(_describe(candidates, laps, batch, operations))
    return {"preset": options.preset, "differences": differences, "batches": parts}


def _build(options: argparse.Namespace, ours: SparseFormer) -> tuple[list[Candidate], dict[str, float]]:
    """What is timed, and how far its output is from ours where it should be the same."""
    device, dtype, side = options.device, options.torch_dtype, 224
    differences: dict[str, float] = {}
    modules: list[tuple[str, nn.Module, int]] = [("ours", ours, side)]
    if options.official is not None:
        official = build_official(options.official, options.preset, ours)
        differences["official"] = _compare(ours, official)
        modules.append(("official", official, side))
    for spec in options.rival:
        vit, size = build_vit(spec)
        modules.append((spec, vit, size))
    candidates = []
    for name, module, size in modules:
        gmacs = count_gmacs(module, size)
        module.to(device=device, dtype=dtype)
        candidates.append(Candidate(name, module, size, gmacs))
        if module is ours:
            for word, look in _variants(ours, options).items():
                candidates.append(Candidate(f"ours, {word}", look, size, gmacs))
                differences[f"ours, {word}"] = _check(ours, word, look)
        elif options.rival_graphs:
            graphed = _graph(module, torch.zeros(1, 3, size, size, device=device, dtype=dtype))
            if graphed is not None:
                candidates.append(Candidate(f"{name}, graph", graphed, size, gmacs))
    return candidates, differences


def _graph(module: nn.Module, pictures: Tensor) -> Callable[[Tensor], Any] | None:
    """A rival through CUDA graphs; None, and a word about it, if it does what no graph can hold."""
    calls: GraphedCalls[Any] = GraphedCalls(module, module)
    try:
        calls(pictures)
    except RuntimeError as error:
        print(f"{type(module).__name__} does not run as a CUDA graph: {error}", file=sys.stderr)
        return None
    return calls


def _variants(ours: SparseFormer, options: argparse.Namespace) -> dict[str, Callable[[Tensor], Any]]:
    """The other ways to run our encoder on this device."""
    variants: dict[str, Callable[[Tensor], Any]] = {}
    if options.device.startswith("cuda"):
        from sparse_vlm.graphs import GraphedEncoder

        variants["graph"] = GraphedEncoder(ours)
        if options.compile:
            variants["compiled"] = torch.compile(ours, fullgraph=True, dynamic=False)
            variants["compiled graph"] = GraphedEncoder(ours, compile="default")
        if options.autotune:
            variants["autotuned graph"] = GraphedEncoder(ours, compile="max-autotune-no-cudagraphs")
    else:
        packed = copy.deepcopy(ours)
        if pack_linears(packed):
            variants["packed"] = packed
        if options.compile:
            variants["compiled"] = _freeze(ours)
        if ours.dtype == torch.float32 and what_is_missing() is None:
            for digits, name in ((3, "3 digits"), (2, "2 digits"), (1, "1 digit")):
                variants[name] = split = copy.deepcopy(ours)
                pack_digits(split, digits)
        if ours.dtype == torch.float32 and has_bf16(options.device):
            half = copy.deepcopy(ours).bfloat16()
            variants["bf16"] = half
            packed_half = copy.deepcopy(half)
            if pack_linears(packed_half):
                variants["bf16 packed"] = packed_half
            if options.compile:
                variants["bf16 compiled"] = _freeze(half)
    return variants


def _check(ours: SparseFormer, name: str, look: Callable[[Tensor], Any]) -> float:
    """The difference of a variant from the plain one.

    Raises:
        InputError: If it is more than its precision explains.
    """
    difference = _difference(ours, look)
    if not difference < _OWN_TOLERANCE.get(name, _TOLERANCE[ours.dtype]):
        raise InputError(f"Ours, {name}, differs from ours by {difference:.1e}: nothing to compare.")
    return difference


def _freeze(encoder: SparseFormer) -> Callable[[Tensor], Any]:
    """The encoder compiled for a CPU, its weights constants that the compiler lays out as it likes."""
    return torch.compile(encoder, fullgraph=True, dynamic=False, options={"freezing": True})


def _compare(ours: SparseFormer, official: nn.Module) -> float:
    """Largest difference of the outputs, in fractions of the largest output.

    Raises:
        InputError: If it is not rounding.
    """
    difference = _difference(ours, official)
    if not difference < _TOLERANCE[torch.float32]:
        raise InputError(f"Our output differs from the official one by {difference:.1e}: nothing to compare.")
    return difference


def _difference(ours: SparseFormer, other: Callable[[Tensor], Any]) -> float:
    """Largest difference of the pooled outputs for one picture, in fractions of the largest."""
    pictures = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    pictures = pictures.to(ours.device, ours.dtype)
    with torch.inference_mode():
        mine, theirs = ours(pictures).pooled, other(pictures)
        theirs = getattr(theirs, "pooled", theirs)
        return float((mine - theirs).abs().max() / theirs.abs().max())


def _work(candidate: Candidate, batch: int, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    side = candidate.image_size
    pictures = torch.randn(batch, 3, side, side, device=device).to(dtype)
    return lambda: candidate.look(pictures)


def _describe(
    candidates: list[Candidate], laps: dict[str, Laps], batch: int, operations: float
) -> dict[str, Any]:
    first = candidates[0].name
    rows: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        rows[candidate.name] = {"gmacs": candidate.gmacs, "image_size": candidate.image_size}
        for clock in ("wall", "cpu"):
            own, product = laps[candidate.name].summary(clock), laps[MATRIX].summary(clock)
            # Operations per second over those of the square product, both by this clock.
            share = 2e9 * candidate.gmacs * batch / own.median / (operations / product.median)
            rows[candidate.name][clock] = {
                **vars(own),
                "fastest": min(laps[candidate.name].times(clock)),
                "times_ours": vars(ratio(laps[candidate.name], laps[first], clock)),
                "share_of_matrix_rate": share,
            }
    matrix = {clock: operations / laps[MATRIX].summary(clock).median for clock in ("wall", "cpu")}
    return {"batch": batch, "matrix_flops": matrix, "candidates": rows}


def show(report: dict[str, Any]) -> str:
    """The tables: medians, quartiles, and how many times longer than ours."""
    from eval.costs.clock import Timing

    lines = []
    if report["differences"]:
        found = ", ".join(f"{name} {difference:.1e}" for name, difference in report["differences"].items())
        lines.append(f"Largest difference from ours, in fractions of the largest output: {found}.")
    for part in report["batches"]:
        rate = part["matrix_flops"]
        lines.append(
            f"\n{report['preset']}, batch {part['batch']}; matrix products reach "
            f"{rate['wall'] / 1e9:.0f} GFLOP/s by the wall clock, {rate['cpu'] / 1e9:.0f} by processor time."
        )
        head = ["", "GMACs", "ms", "times ours", "% of rate", "CPU ms", "fastest", "times ours", "% of rate"]
        rows = []
        for name, row in part["candidates"].items():
            cells = [name, f"{row['gmacs']:.1f}"]
            for clock in ("wall", "cpu"):
                one = row[clock]
                cells.append(f"{1e3 * one['median']:.1f}")
                if clock == "cpu":
                    cells.append(f"{1e3 * one['fastest']:.1f}")
                cells += [
                    format_spread(Timing(**one["times_ours"])),
                    f"{100 * one['share_of_matrix_rate']:.0f}",
                ]
            rows.append(cells)
        lines.append(table(head, rows))
    return "\n".join(lines)
