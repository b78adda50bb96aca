"""k nearest neighbours, with DINO's weighted vote: what embeddings know without any training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vote(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Tensor:
    """Class scores by the k nearest neighbours.

    Each neighbour votes for its class with exp(cosine / temperature) (DINO, arXiv 2104.14294, section 4.1).

    Args:
        train: (n, E).
        train_labels: (n,).
        test: (m, E).
        k: Neighbours; all of them where there are fewer.
        temperature: Of the votes.
        chunk: Test rows at once, which bounds memory.

    Returns:
        (m, classes).
    """
    known = F.normalize(train.float(), dim=-1)
    classes = int(train_labels.max()) + 1
    parts = []
    for rows in F.normalize(test.float(), dim=-1).split(chunk):
        nearest = (rows @ known.T).topk(min(k, len(known)), dim=-1)
        weights = (nearest.values / temperature).exp()
        votes = torch.zeros(len(rows), classes)
        parts.append(votes.scatter_add_(1, train_labels[nearest.indices], weights))
    return torch.cat(parts)
