"""Zero-shot classification: pictures against the names of classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from eval.answers import InputError

_TEXTS_AT_ONCE = 512


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
    parts = []
    step = max(1, _TEXTS_AT_ONCE // len(templates))
    with tqdm(total=len(names), unit="class", desc="prompts", disable=None) as bar:
        for start in range(0, len(names), step):
            some = names[start : start + step]
            texts = encode([template.replace("{}", name) for name in some for template in templates])
            units = F.normalize(texts.float().cpu(), dim=-1).unflatten(
                0, (len(some), -1)
            )  # (n, templates, E)
            parts.append(F.normalize(units.mean(dim=1), dim=-1))
            bar.update(len(some))
    return torch.cat(parts)


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
        scores: (n, classes); minus infinity: not among them.
        labels: (n,) the right class.
        tops: Values of k; those above the number of classes are left out.
    """
    best = scores.topk(min(max(tops), scores.shape[1]), dim=-1)
    hits = (best.indices == labels[:, None]) & best.values.isfinite()
    return {k: hits[:, :k].any(dim=-1).int().tolist() for k in tops if k <= scores.shape[1]}
