"""Peak memory of a training step: every tensor's bytes, from its birth to its death, on any device."""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eval.answers import InputError
from eval.bench.rivals import build_ours, build_vit
from eval.bench.turns import table


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive at once.

    Attributes:
        live: Bytes alive now.
        peak: The most there ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of new storage."""
        result = func(*args, **(kwargs or {}))
        # What an operation was given is not new, whatever it returns of it.
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size


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
        with PeakBytes() as counter:
            work(images)
        peaks.append(counter.peak)
    if peaks[1] <= peaks[0]:
        raise InputError("Two pictures took no more memory than one: the count is not to be trusted.")
    return peaks[1] - peaks[0]


def show(report: dict[str, Any]) -> str:
    """Megabytes a picture."""
    rows = [[name, f"{size / 1e6:.0f}"] for name, size in report["peak_bytes_a_picture"].items()]
    weights, trained = report["weights_bytes"] / 1e6, report["with_adamw_bytes"] / 1e6
    head = f"{report['preset']}: weights {weights:.0f} MB, with gradients and AdamW {trained:.0f} MB."
    return head + "\n" + table(["peak of one more picture", "MB"], rows)
