"""The order of an epoch: a pure function of (seed, epoch, rank, world_size)."""

from __future__ import annotations

import numpy as np


def epoch_order(count: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """One rank's share of a shuffled epoch.

    The shares of all ranks are disjoint and together cover every item once; they differ by one in length at
    most.

    Args:
        count: number of items in the source.
        seed: of the run.
        epoch: from 0.
        rank: of this process.
        world_size: number of processes.

    Returns:
        int64 indices.
    """
    order = np.random.default_rng([seed, epoch, 0x0DE2]).permutation(count)
    return order[rank::world_size].astype(np.int64)


def block_order(count: int, seed: int, epoch: int, shard: int, block: int) -> np.ndarray:
    """The order inside one block of a streamed shard.

    Returns:
        (count,) int64 positions within the block.
    """
    return np.random.default_rng([seed, epoch, shard, block, 0x0DE3]).permutation(count).astype(np.int64)
