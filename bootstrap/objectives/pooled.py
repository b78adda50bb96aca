"""The published idea: align the pooled embedding with the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .distance import measure_distance


def align_pooled(pooled: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine, averaged over pictures.

    Args:
        pooled: (B, E).
        target: (B, E).

    Returns:
        A scalar from 0 (aligned) to 2.
    """
    return 1.0 - F.cosine_similarity(pooled.float(), target.float(), dim=-1).mean()


def match_pooled(pooled: Tensor, target: Tensor, spread: Tensor) -> Tensor:
    """Mean squared distance, channel by channel in units of the teacher's own spread.

    Unlike the cosine it also learns the length, and small channels as much as large ones.

    Args:
        pooled: (B, E).
        target: (B, E).
        spread: (E,) standard deviation of the teacher's embeddings.

    Returns:
        A scalar; 1 is what the mean of the data would reach.
    """
    return measure_distance(pooled, target, spread)
