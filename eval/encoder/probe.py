"""A linear classifier on frozen embeddings: multinomial logistic regression, fitted to convergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.answers import InputError

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
_STEPS = 1000


@dataclass(frozen=True)
class Probe:
    """A fitted classifier.

    Attributes:
        mean: (E,) of the training embeddings.
        scale: (E,) their standard deviation; 1 where an entry never changes.
        weight: (classes, E).
        bias: (classes,).
        seen: (classes,) whether training had the class.
        strength: Inverse strength of the regularisation (C) that was chosen.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    seen: Tensor
    strength: float

    def scores(self, values: Tensor) -> Tensor:
        """Class scores (m, classes) of embeddings (m, E); a class that training never saw stays last."""
        logits = F.linear((values.double() - self.mean) / self.scale, self.weight, self.bias)
        return logits.masked_fill(~self.seen, -torch.inf)


def fit_probe(
    train: Tensor,
    labels: Tensor,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    device: str = "cpu",
) -> Probe:
    """Logistic regression with an L2 penalty on standardised embeddings, by L-BFGS.

    The loss is scikit-learn's: the sum of the cross entropies times C, plus half the squared weights, the
    bias left free. C is chosen on a fifth of the training pictures, drawn from a seed; the probe is then
    fitted on all of them. Test pictures take no part.

    Args:
        train: (n, E).
        labels: (n,).
        classes: How many there are.
        strengths: Values of C to choose from; the smallest of equally good ones is taken.
        seed: Of the split.
        device: Where to fit.

    Raises:
        InputError: If there are fewer than two pictures.
    """
    if len(train) < 2:
        raise InputError(f"A probe needs two training pictures at least, and there is {len(train)}.")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: max(1, len(train) // 5)], order[max(1, len(train) // 5) :]
    right = []
    for strength in strengths:
        made = _fit(train[rest], labels[rest], classes, strength, device)
        right.append(int((made.scores(train[held]).argmax(-1) == labels[held]).sum()))
    return _fit(train, labels, classes, strengths[right.index(max(right))], device)


def _fit(train: Tensor, labels: Tensor, classes: int, strength: float, device: str) -> Probe:
    values, labels = train.to(device).double(), labels.to(device)
    mean, scale = values.mean(dim=0), values.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = (values - mean) / scale
    seen = torch.zeros(classes, dtype=torch.bool, device=device).index_fill_(0, labels, True)
    weight = torch.zeros(classes, values.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        logits = F.linear(values, weight, bias).masked_fill(~seen, -torch.inf)
        # The mean over the pictures keeps the gradient's size, and so the tolerance, apart from n.
        made = F.cross_entropy(logits, labels) + weight.square().sum() / (2 * strength * len(values))
        made.backward()
        return made

    solver.step(loss)
    mean, scale, seen = mean.cpu(), scale.cpu(), seen.cpu()
    return Probe(mean, scale, weight.detach().cpu(), bias.detach().cpu(), seen, strength)
