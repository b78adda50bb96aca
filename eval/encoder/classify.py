"""Zero-shot classification: pictures against the names of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from eval.answers import InputError


def build_classifier(
    names: Sequence[str], templates: Sequence[str], encode: Callable[[Sequence[str]], Tensor]
) -> Tensor:
    """One unit vector a class: the mean of its prompts' unit vectors, as CLIP does.

    Args:
        names: Classes.
        templates: Prompts, with "{}" for the name.
        encode: Texts to embeddings (n, E).

    Returns:
        (classes, E).
    """
    rows = []
    for name in tqdm(names, unit="class", desc="prompts", disable=None):
        texts = encode([template.replace("{}", name) for template in templates]).float().cpu()
        rows.append(F.normalize(F.normalize(texts, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(rows)


def rank_classes(values: Tensor, classifier: Tensor) -> Tensor:
    """Cosine similarities (n, classes) of embeddings (n, E) to classes (classes, E)."""
    if values.shape[1] != classifier.shape[1]:
        raise InputError(
            f"The pictures' embeddings have width {values.shape[1]}, the texts' {classifier.shape[1]}: they "
            "are not of one space."
        )
    return F.normalize(values.float(), dim=-1) @ F.normalize(classifier.float(), dim=-1).T


def score_ranks(scores: Tensor, labels: Tensor, tops: Sequence[int] = (1, 5)) -> dict[int, list[int]]:
    """For each k, whether the right class is among the k best, a picture each.

    Args:
        scores: (n, classes).
        labels: (n,) the right class.
        tops: Values of k; those above the number of classes are left out.
    """
    best = scores.topk(min(max(tops), scores.shape[1]), dim=-1).indices
    hits = best == labels[:, None]
    return {k: hits[:, :k].any(dim=-1).int().tolist() for k in tops if k <= scores.shape[1]}
