"""The optimiser with its cosine schedule, and an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimiserSettings
from .muon import MuonAndAdamW

# Never decayed although they are no vectors: coordinates, and rows that stand for something rather than map
# something. Matrices and the stem's filters are.
_NOT_DECAYED = ("initial_rois", "token_embedding", "stage_embedding", "offset_bias", "cls_token", "probe")
# What the warm-up runs; everything else has no gradient then.
_WARMING_UP = ("stem.", "focusing.", "cortex.entry_norm.")

# (peak learning rate, has no part in the warm-up) -> parameters.
_Groups = dict[tuple[float, bool], list[nn.Parameter]]


def build_optimiser(encoder: nn.Module, settings: OptimiserSettings) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, or Muon over the matrices among them and AdamW over the rest.

    Args:
        encoder: the SparseFormer; frozen parameters are left out.
        settings: learning rates and decays.

    Returns:
        The optimiser. Its groups also have ``peak_lr``, and ``rests``: whether their parameters have no part
        in the warm-up.
    """
    decayed: _Groups = {}
    others: _Groups = {}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = settings.cortex_lr if name.startswith("cortex.") else settings.lr
        decays = parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in _NOT_DECAYED
        rests = not name.startswith(_WARMING_UP)
        (decayed if decays else others).setdefault((lr, rests), []).append(parameter)
    betas = (settings.beta1, settings.beta2)
    fused = _can_fuse(
        [parameter for part in (decayed, others) for group in part.values() for parameter in group]
    )
    if not settings.muon_lr:
        groups = _group(decayed, weight_decay=settings.weight_decay) + _group(others, weight_decay=0.0)
        return torch.optim.AdamW(groups, betas=betas, fused=fused)
    ratio = settings.muon_lr / settings.lr
    matrices: _Groups = {}
    for (lr, rests), parameters in decayed.items():
        for parameter in parameters:
            # The stem's filters are no matrices.
            kind, rate = (matrices, ratio * lr) if parameter.ndim == 2 else (others, lr)
            kind.setdefault((rate, rests), []).append(parameter)
    return MuonAndAdamW(_group(matrices), _group(others), settings.weight_decay, betas, fused)


def _group(parameters: _Groups, **settings: float) -> list[dict[str, Any]]:
    return [
        {"params": group, "lr": lr, "peak_lr": lr, "rests": rests, **settings}
        for (lr, rests), group in parameters.items()
    ]


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    """Whether AdamW's one-pass form runs on these parameters, which goes over memory once."""
    devices = {parameter.device.type for parameter in parameters}
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return bool(devices) and (devices == {"cuda"} or (devices == {"cpu"} and release >= (2, 4)))


def schedule(step: int, steps: int, settings: OptimiserSettings) -> float:
    """The factor on the peak learning rates at a step, counted from 0: linear warm-up, then half a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.final_lr + (1.0 - settings.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to its peak learning rate times ``factor``."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * factor


def rest_groups(optimiser: torch.optim.Optimizer, warming_up: bool, first_after: bool) -> None:
    """Leave alone what has no part in the warm-up, under an optimiser that sees gradients of zero there.

    Args:
        optimiser: from :func:`build_optimiser`, its learning rates set for this step.
        warming_up: whether this step belongs to the warm-up.
        first_after: whether it is the first that does not.
    """
    for group in optimiser.param_groups:
        if group["rests"] and warming_up:
            group["lr"] = 0.0  # the moments stay zero by themselves
        elif group["rests"] and first_after:
            for parameter in group["params"]:
                if parameter in optimiser.state:
                    optimiser.state[parameter]["step"].zero_()


class WeightAverage:
    """Exponential moving average of the trainable parameters.

    The decay grows with the number of updates up to the one asked for, so that early weights are forgotten.

    Args:
        named_parameters: names and parameters to follow.
        decay: share of the average that stays at each update.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().clone()
            for name, parameter in named_parameters
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take in the parameters as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in named_parameters:
            if name in self.shadow:
                self.shadow[name].lerp_(parameter.detach().to(self.shadow[name].dtype), 1.0 - decay)


@contextmanager
def averaged(encoder: nn.Module, average: WeightAverage | None) -> Iterator[None]:
    """Inside the block the encoder has the averaged weights; afterwards its own again, bit for bit."""
    if average is None:
        yield
        return
    parameters = dict(encoder.named_parameters())
    own = {name: parameters[name].detach().clone() for name in average.shadow}
    with torch.no_grad():
        for name, value in average.shadow.items():
            parameters[name].copy_(value)
        try:
            yield
        finally:
            for name, value in own.items():
                parameters[name].copy_(value)
