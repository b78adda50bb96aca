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
        A scalar. The mean of the data reaches less than 1, as averages over regions vary less than the
        single tokens that the spread is of: 0.61 with the real AugReg ViT-Ti and 48 tiles.
    """
    return measure_distance(tokens, target, spread)
