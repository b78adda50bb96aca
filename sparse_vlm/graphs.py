"""CUDA graphs for inference: a whole forward pass as one launch.

A small batch keeps a GPU busy for less time than it takes Python to launch some nine hundred kernels one by
one. A graph launches them all at once. Needs a CUDA device; the results are the plain encoder's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from .encoder import EncoderOutput, SparseFormer


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    images: Tensor
    output: EncoderOutput


def _autocast() -> tuple[bool, torch.dtype]:
    """What decides the kernels beside the arguments: whether autocast is on, and its precision."""
    ask = getattr(torch, "get_autocast_dtype", None)  # came after torch 2.1, which has the other one
    return torch.is_autocast_enabled(), ask("cuda") if ask else torch.get_autocast_gpu_dtype()


class GraphedEncoder:
    """Calls an encoder through CUDA graphs, one for each shape of pictures, token count and autocast.

    The first call with a new shape records (and takes as long as a few plain calls); later ones replay. A
    graph reads the weights where they lie, so values changed in place count; weights that were moved or cast
    do not: make a new one. Each graph keeps the memory of its activations.

    Args:
        encoder: on a CUDA device; it is run in inference mode.
        keep: most graphs to keep; the one unused for longest is dropped.

    Raises:
        ValueError: if the encoder is not on a CUDA device, or ``keep`` is less than one.
    """

    def __init__(self, encoder: SparseFormer, keep: int = 8) -> None:
        if encoder.device.type != "cuda":
            raise ValueError(f"CUDA graphs need the encoder on a CUDA device, it is on {encoder.device}")
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.encoder = encoder
        self.keep = keep
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, num_tokens: int | None = None, hidden_states: bool = False
    ) -> EncoderOutput:
        """What ``encoder(images, num_tokens, hidden_states)`` returns, as tensors of the caller's own."""
        key = (tuple(images.shape), images.dtype, num_tokens, hidden_states, *_autocast())
        recording = self._recordings.pop(key, None)
        if recording is None:
            recording = self._record(images.to(self.encoder.device), num_tokens, hidden_states)
            while len(self._recordings) >= self.keep:
                self._recordings.popitem(last=False)
        self._recordings[key] = recording
        recording.images.copy_(images)
        recording.graph.replay()
        # The next replay writes over the graph's own output.
        tokens, rois, pooled, states = recording.output
        return EncoderOutput(
            tokens.clone(),
            tuple(value.clone() for value in rois),
            pooled.clone(),
            None if states is None else tuple(value.clone() for value in states),
        )

    def _record(self, images: Tensor, num_tokens: int | None, hidden_states: bool) -> _Recording:
        held = images.clone()
        enabled, dtype = _autocast()
        # Autocast keeps cast weights until it ends; a graph would go on reading them afterwards.
        uncached = torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
        with torch.cuda.device(self.encoder.device), uncached:
            # Libraries allocate and choose their kernels in the first calls, which a graph must not record.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.encoder(held, num_tokens, hidden_states)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.encoder(held, num_tokens, hidden_states)
        return _Recording(graph, held, output)
