"""The warm-up objective: hand-over tokens against the teacher's mid-depth tokens."""

from __future__ import annotations

from torch import Tensor


def match_handover(handover: Tensor, target: Tensor, spread: Tensor) -> Tensor:
    """Mean squared distance, channel by channel in units of the teacher's own spread.

    A ViT's residual stream has a few channels a hundred times larger than the rest; without the units they
    would be all the student learns.

    Args:
        handover: (B, N, D) latents entering the cortex.
        target: (B, N, D) teacher tokens entering the same block, pooled over the tokens' RoIs.
        spread: (D,) standard deviation of the teacher's tokens there.

    Returns:
        A scalar; 1 is what the mean of the data would reach.
    """
    return ((handover.float() - target.float()) / spread).square().mean()
