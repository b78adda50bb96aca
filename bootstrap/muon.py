"""Muon for the matrices, AdamW for everything else, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def has_muon() -> bool:
    """Whether this PyTorch comes with Muon (2.9 and later)."""
    return hasattr(torch.optim, "Muon")


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimisers that step together; groups and states are theirs, seen as one.

    Muon (Jordan et al., 2024) makes every update of a matrix orthogonal, so that directions with small
    gradients move as far as those with large ones. Updates are scaled to the size of AdamW's (Liu et al.,
    arXiv 2502.16982), which makes their learning rates alike.

    Args:
        matrices: parameter groups of matrices, each with its ``lr``.
        rest: parameter groups of everything else.
        weight_decay: on the matrices.
        betas: AdamW's.
        fused: whether AdamW runs in its one-pass form.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        rest: list[dict[str, Any]],
        weight_decay: float,
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        self.muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, weight_decay=0.0, betas=betas, fused=fused)
        # The very dictionaries of the two: a learning rate set here is set there.
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], dict(self.adamw.defaults))
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss
