"""CUDA graphs for inference: a whole forward pass as one launch.

A small batch keeps a GPU busy for less time than it takes Python to launch some nine hundred kernels one by
one. A graph launches them all at once. Needs a CUDA device; the results are the plain encoder's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .encoder import EncoderOutput, SparseFormer
from .graphed_calls import GraphedCalls


class GraphedEncoder:
    """Calls an encoder through CUDA graphs, see :class:`GraphedCalls`.

    Args:
        encoder: on a CUDA device; it is run without gradients.
        keep: most graphs to keep; the one unused for longest is dropped.
        compile: a mode of ``torch.compile`` (``"default"``, ``"max-autotune-no-cudagraphs"``): the graphs are
            those of the compiled encoder, whose small operations are fused. Each new shape compiles, which
            takes a minute or more.

    Raises:
        ValueError: if the encoder is not on a CUDA device, or ``keep`` is less than one.
    """

    def __init__(self, encoder: SparseFormer, keep: int = 8, compile: str | None = None) -> None:
        if encoder.device.type != "cuda":
            raise ValueError(f"CUDA graphs need the encoder on a CUDA device, it is on {encoder.device}")
        self.encoder = encoder
        function = encoder if compile is None else _compile(encoder, compile)
        self.calls: GraphedCalls[EncoderOutput] = GraphedCalls(function, encoder, keep)

    def __call__(
        self, images: Tensor, num_tokens: int | None = None, hidden_states: bool = False
    ) -> EncoderOutput:
        """What ``encoder(images, num_tokens, hidden_states)`` returns, as tensors of the caller's own."""
        return self.calls(images, num_tokens, hidden_states)


def _compile(encoder: SparseFormer, mode: str) -> Callable[..., EncoderOutput]:
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": mode}
    # Every shape is compiled for itself, and many are no accident here. Releases without this argument stop
    # at eight.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        settings["recompile_limit"] = 1 << 10
    compiled: Callable[..., EncoderOutput] = torch.compile(encoder, **settings)
    return compiled
