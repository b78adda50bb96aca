"""Peak memory of a training step for each picture, on any device."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eval.answers import InputError
from eval.bench.rivals import build_ours, build_vit
from eval.bench.turns import table
from eval.costs.memory import measure_growth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench memory`."""
    parser.add_argument("--preset", default="sparseformer_btsp_augreg_base", help="our architecture")
    parser.add_argument("--teacher", default="transformers:ViT-B-16", help="LIBRARY:VIT of the teacher")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks per picture: the difference between two pictures and one.

    Raises:
        InputError: If a model cannot be built.
    """
    encoder = build_ours(options.preset).train().to(options.device, options.torch_dtype)
    teacher, side = build_vit(options.teacher)
    teacher = teacher.to(options.device, options.torch_dtype).requires_grad_(False)

    def train(images: Tensor) -> None:
        encoder(images).tokens.square().sum().backward()
        encoder.zero_grad(set_to_none=False)

    @torch.no_grad()
    def look(images: Tensor) -> None:
        teacher(images)

    peaks: dict[str, int] = {}
    for name, checkpointing in (("student", False), ("student, activation checkpointing", True)):
        encoder.set_grad_checkpointing(checkpointing)
        peaks[name] = _per_picture(train, 224, options)
    peaks[f"teacher {options.teacher}, no gradients"] = _per_picture(look, side, options)
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    return {
        "preset": options.preset,
        "weights_bytes": weights,
        "with_adamw_bytes": 4 * weights,
        "peak_bytes_a_picture": peaks,
    }


def _per_picture(work: Callable[[Tensor], None], side: int, options: argparse.Namespace) -> int:
    peaks = []
    for batch in (1, 2):
        images = torch.randn(batch, 3, side, side, device=options.device, dtype=options.torch_dtype)
        if batch == 1:
            work(images)  # gradients are there before anything is counted
        peaks.append(measure_growth(functools.partial(work, images), options.device))
    if peaks[1] <= peaks[0]:
        raise InputError("Two pictures took no more memory than one: the count is not to be trusted.")
    return peaks[1] - peaks[0]


def show(report: dict[str, Any]) -> str:
    """Megabytes a picture."""
    rows = [[name, f"{size / 1e6:.0f}"] for name, size in report["peak_bytes_a_picture"].items()]
    weights, trained = report["weights_bytes"] / 1e6, report["with_adamw_bytes"] / 1e6
    head = f"{report['preset']}: weights {weights:.0f} MB, with gradients and AdamW {trained:.0f} MB."
    return head + "\n" + table(["peak of one more picture", "MB"], rows)
