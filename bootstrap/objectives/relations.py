"""Relations between pictures: who resembles whom, as the teacher sees it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def match_relations(pooled: Tensor, target: Tensor, temperature: float = 0.05) -> Tensor:
    """Kullback-Leibler divergence of the batch's similarity distributions.

    For each picture, the cosine similarities to all other pictures of the batch become a distribution; the
    student's should be the teacher's.

    Args:
        pooled: (B, E).
        target: (B, E).
        temperature: similarities are divided by it.

    Returns:
        A scalar; zero for a batch of one, which has no relations.
    """
    if pooled.shape[0] < 2:
        return pooled.sum() * 0.0
    ours, theirs = (_log_relations(embedding, temperature) for embedding in (pooled, target))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _log_relations(embedding: Tensor, temperature: float) -> Tensor:
    embedding = F.normalize(embedding.float(), dim=-1)
    similarity = embedding @ embedding.T / temperature
    count = similarity.shape[0]
    others = ~torch.eye(count, dtype=torch.bool, device=similarity.device)
    return similarity[others].view(count, count - 1).log_softmax(dim=-1)  # (B, B - 1)
