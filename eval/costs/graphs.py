"""Any vision tower through CUDA graphs, so that a comparison gives all towers the same chance."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_integration.hf import SparseFormerVisionModel
from sparse_vlm.graphed_calls import GraphedCalls


def graph_tower(tower: Any) -> None:
    """Lets a tower of transformers run through CUDA graphs from now on; for inference.

    Args:
        tower: A SparseFormer, or any other whose output is a mapping of tensors and tuples of them.
    """
    if isinstance(tower, SparseFormerVisionModel):
        tower.use_graphs()
        return
    plain = tower.forward
    calls: GraphedCalls[Any] = GraphedCalls(lambda pixels, settings: plain(pixels, **dict(settings)), tower)

    def forward(pixel_values: Tensor, **settings: Any) -> Any:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        return calls(pixel_values, tuple(given.items()))

    tower.forward = forward
