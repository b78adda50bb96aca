"""The distance that all matching objectives share."""

from __future__ import annotations

from torch import Tensor


def measure_distance(ours: Tensor, target: Tensor, spread: Tensor) -> Tensor:
    """Mean squared distance, channel by channel in units of the teacher's own spread.

    A ViT's residual stream has a few channels a hundred times larger than the rest; without the units they
    would be all the student learns.

    Args:
        ours: (…, D).
        target: (…, D), the teacher's.
        spread: (D,) standard deviation of the teacher's values.

    Returns:
        A scalar; 1 is what the mean would reach of data with this spread, less of data that varies less.
    """
    return ((ours.float() - target.float()) / spread).square().mean()
