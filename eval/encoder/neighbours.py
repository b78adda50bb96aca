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
    device: str = "cpu",
) -> Tensor:
    """Class scores by the k nearest neighbours.

    Each neighbour votes for its class with exp(cosine / temperature) (DINO, arXiv 2104.14294, section 4.1),
    here divided by the nearest one's vote.

    Args:
        train: (n, E).
        train_labels: (n,).
        test: (m, E).
        k: Neighbours; all of them where there are fewer.
        temperature: Of the votes.
        chunk: Test rows at once, which bounds memory.
        device: Where to compare.

    Returns:
        (m, classes); minus infinity for a class that no neighbour is of.
    """
    known = F.normalize(train.to(device).float(), dim=-1)
    labels = train_labels.to(device)
    classes = int(train_labels.max()) + 1
    parts = []
    for rows in F.normalize(test.float(), dim=-1).split(chunk):
        nearest = (rows.to(device) @ known.T).topk(min(k, len(known)), dim=-1)
        # Less the nearest one's, which all votes of a row share, so that no small temperature overflows.
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=device)
        votes.scatter_add_(1, labels[nearest.indices], weights)
        there = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, labels[nearest.indices], True)
        parts.append(votes.masked_fill(~there, float("-inf")).cpu())
    return torch.cat(parts)
