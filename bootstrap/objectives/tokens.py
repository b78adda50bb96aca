"""Final tokens against the teacher's final tokens: what a language model will read."""

from __future__ import annotations

from torch import Tensor

from .distance import measure_distance


def match_tokens(tokens: Tensor, target: Tensor, spread: Tensor) -> Tensor:
    """Mean squared distance, channel by channel in units of the teacher's own spread.

    Args:
        tokens: (B, N, D) normalised latents.
        target: (B, N, D) teacher's normalised patch tokens, pooled over the tokens' RoIs.
        spread: (D,) standard deviation of the teacher's tokens.

    Returns:
        A scalar; 1 is what the mean of the data would reach.
    """
    return measure_distance(tokens, target, spread)
