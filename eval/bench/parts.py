"""Where an encoder's time goes, part by part, beside the floor that arithmetic and bytes set."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bootstrap.cost import count_work
from eval.answers import InputError
from eval.bench.rivals import build_ours
from eval.bench.turns import matrix_product, table, take_turns
from sparse_vlm import SparseFormer
from sparse_vlm.digits import DigitsError, pack_digits
from sparse_vlm.focusing import FocusingStage
from sparse_vlm.fused import mix_samples
from sparse_vlm.packed import pack_linears
from sparse_vlm.roi_steps import encode_rois
from sparse_vlm.sampling import sample_features

WHOLE, MATRIX, COPY = "whole", "matrix product", "copy"
_COPIED = 1 << 26  # bytes


@dataclass(frozen=True)
class Part:
    """One kind of work within a forward pass.

    Attributes:
        name: As printed.
        work: It once, on tensors of the right shape.
        calls: How often a forward pass does it.
        moved: Bytes that one call cannot avoid: its weights, what it reads and what it leaves.
    """

    name: str
    work: Callable[[], Any]
    calls: int
    moved: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench parts`."""
    parser.add_argument("--preset", default="sparseformer_btsp_augreg_base", help="our architecture")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pictures at once")
    faster = parser.add_mutually_exclusive_group()
    faster.add_argument("--packed", action="store_true", help="with packed linear layers (CPU)")
    faster.add_argument(
        "--digits", type=int, choices=(1, 2, 3), help="with linear layers that multiply digits (AMX)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times every part on its own, in turn with the whole.

    Raises:
        InputError: If the encoder cannot be built.
    """
    if min(options.batch) < 1:
        raise InputError("--batch must be at least 1.")
    encoder = build_ours(options.preset).requires_grad_(False)
    if encoder.config.focusing_order[0] != "sample":
        raise InputError(f"--preset {options.preset}: the parts are those of a bootstrapped SparseFormer.")
    encoder.to(device=options.device, dtype=options.torch_dtype)
    timed = copy.deepcopy(encoder)
    if options.packed and not pack_linears(timed):
        raise InputError("--packed: this PyTorch has no packed linear layers.")
    if options.digits is not None:
        try:
            pack_digits(timed, options.digits, strict=True)
        except DigitsError as error:
            raise InputError(f"--digits: {error}.") from None
    with torch.inference_mode():
        batches = [_measure(encoder, timed, batch, options) for batch in options.batch]
    way = ", packed" if options.packed else f", {options.digits} digits" if options.digits else ""
    return {"preset": options.preset, "way": way, "batches": batches}


def _measure(
    encoder: SparseFormer, timed: SparseFormer, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    device, dtype = options.device, options.torch_dtype
    images = torch.randn(batch, 3, 224, 224, device=device).to(dtype)
    # Counted before packing: the counter does not know oneDNN's own layers.
    counts = {part.name: count_work(part.work) for part in list_parts(encoder, images)}
    parts = list_parts(timed, images)
    product, operations = matrix_product(device, dtype)
    block = torch.zeros(_COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(block)  # memory that was touched before: first touches cost page faults
    works = {part.name: part.work for part in parts}
    works |= {WHOLE: lambda: timed(images), MATRIX: product, COPY: lambda: target.copy_(block)}
    laps = take_turns(works, options.rounds, device)
    report: dict[str, Any] = {"batch": batch, "parts": {}}
    for clock in ("wall", "cpu"):
        # A copy reads and writes.
        rate = operations / laps[MATRIX].summary(clock).median
        bandwidth = 2 * _COPIED / laps[COPY].summary(clock).median
        report[clock] = {
            "flops": rate,
            "bytes_a_second": bandwidth,
            "whole_ms": 1e3 * laps[WHOLE].summary(clock).median,
        }
    for part in parts:
        gmacs = counts[part.name] * part.calls
        entry: dict[str, Any] = {"calls": part.calls, "gmacs": gmacs, "bytes": part.moved * part.calls}
        for clock in ("wall", "cpu"):
            arithmetic = 2e12 * gmacs / report[clock]["flops"]
            moving = 1e3 * entry["bytes"] / report[clock]["bytes_a_second"]
            entry[clock] = {
                "ms": 1e3 * laps[part.name].summary(clock).median * part.calls,
                "arithmetic_ms": arithmetic,
                "bytes_ms": moving,
            }
        report["parts"][part.name] = entry
    return report


def list_parts(encoder: SparseFormer, images: Tensor) -> list[Part]:
    """The parts of a bootstrapped encoder's forward pass over pictures (B, 3, H, W)."""
    focusing, cortex = encoder.focusing, encoder.cortex
    stage, handover, repeats = focusing.stage, focusing.handover, focusing.repeats
    feature_map = encoder.stem(images)
    tokens, rois = focusing.start(images.shape[0], focusing.num_latents)
    tokens = tokens.contiguous()
    wide = focusing.lift(tokens)
    _, states = cortex(wide, hidden_states=True)
    assert states is not None
    full = states[0]
    block: Any = cortex.blocks[0]
    points = stage.place(stage.offset_norm(tokens), rois)
    samples = sample_features(feature_map, points)
    matrices, wide_matrices = stage.mixing.generate(tokens), handover.mixing.generate(wide)

    def sample(which: FocusingStage, rows: Tensor) -> Callable[[], Any]:
        return lambda: sample_features(feature_map, which.place(which.offset_norm(rows), rois), which.padding)

    def position(which: FocusingStage, rows: Tensor) -> Callable[[], Any]:
        return lambda: which.position(
            which.position_norm(encode_rois(rois, which.width, which.temperature, rows.dtype))
        )

    def generators(which: FocusingStage) -> list[nn.Module]:
        return [which.mixing.generator_in, which.mixing.generator_out]

    # Four corners of every point.
    corners = 4 * samples.numel() * samples.element_size()
    heads = [_bytes(stage.offset), _bytes(handover.offset)]
    named: list[tuple[str, Callable[[], Any], int, int]] = [
        ("stem", lambda: encoder.stem(images), 1, _bytes(encoder.stem, images, feature_map)),
        ("sampling", sample(stage, tokens), repeats, heads[0] + corners + _bytes(tokens, samples)),
        ("sampling, hand-over", sample(handover, wide), 1, heads[1] + corners + _bytes(wide, samples)),
        (
            "generation of mixing weights",
            lambda: stage.mixing.generate(tokens),
            repeats,
            _bytes(*generators(stage), tokens, *matrices),
        ),
        (
            "generation, hand-over",
            lambda: handover.mixing.generate(wide),
            1,
            _bytes(*generators(handover), wide, *wide_matrices),
        ),
        (
            "mixing",
            lambda: stage.mixing.out(mix_samples(samples, *matrices)),
            repeats,
            _bytes(stage.mixing.out, samples, *matrices, tokens),
        ),
        (
            "mixing, hand-over",
            lambda: handover.mixing.out(mix_samples(samples, *wide_matrices)),
            1,
            _bytes(handover.mixing.out, samples, *wide_matrices, wide),
        ),
        ("position code", position(stage, tokens), repeats, _bytes(stage.position, tokens)),
        ("position code, hand-over", position(handover, wide), 1, _bytes(handover.position, wide)),
        (
            "focusing attention",
            lambda: stage.attn(stage.norm1(tokens)),
            repeats,
            _bytes(stage.attn, tokens, tokens),
        ),
        ("focusing MLP", lambda: stage.mlp(stage.norm2(tokens)), repeats, _bytes(stage.mlp, tokens, tokens)),
        (
            "cortex attention",
            lambda: block.attn(block.norm1(full)),
            len(cortex.blocks),
            _bytes(block.attn, full, full),
        ),
        (
            "cortex MLP",
            lambda: block.mlp(block.norm2(full)),
            len(cortex.blocks),
            _bytes(block.mlp, full, full),
        ),
        ("head", lambda: encoder.head(full), 1, _bytes(encoder.head, full, full)),
    ]
    return [Part(*entry) for entry in named]


def _bytes(*things: nn.Module | Tensor) -> int:
    tensors: Iterable[Tensor] = (
        tensor
        for thing in things
        for tensor in ([thing] if isinstance(thing, Tensor) else thing.parameters())
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def show(report: dict[str, Any]) -> str:
    """A table a batch size: processor time on a CPU, and the floor by arithmetic or bytes."""
    lines = []
    for part in report["batches"]:
        clock = "cpu" if report["provenance"]["device"].startswith("CPU") else "wall"
        rates, rows = part[clock], []
        for name, entry in part["parts"].items():
            one = entry[clock]
            floor = max(one["arithmetic_ms"], one["bytes_ms"])
            why = "arithmetic" if one["arithmetic_ms"] >= one["bytes_ms"] else "bytes"
            share = 100 * one["ms"] / rates["whole_ms"]
            rows.append(
                [
                    name,
                    f"{entry['gmacs']:.3f}",
                    f"{entry['bytes'] / 1e6:.1f}",
                    f"{one['ms']:.2f}",
                    f"{share:.1f}",
                    f"{floor:.2f}",
                    why,
                ]
            )
        inside = sum(entry[clock]["ms"] for entry in part["parts"].values())
        rest = rates["whole_ms"] - inside
        rows.append(
            ["everything else", "", "", f"{rest:.2f}", f"{100 * rest / rates['whole_ms']:.1f}", "", ""]
        )
        rows.append(["whole", "", "", f"{rates['whole_ms']:.2f}", "100", "", ""])
        lines.append(
            f"\n{report['preset']}{report['way']}, batch {part['batch']}; {clock} time; "
            f"in this run {rates['flops'] / 1e9:.0f} GFLOP/s and {rates['bytes_a_second'] / 1e9:.1f} GB/s."
        )
        lines.append(table(["", "GMACs", "MB", "ms", "%", "floor ms", "set by"], rows))
    return "\n".join(lines)
