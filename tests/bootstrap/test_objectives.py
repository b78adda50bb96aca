"""Each objective against a plain computation, and at its extremes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bootstrap.config import ObjectiveSettings
from bootstrap.objectives import (
    align_pooled,
    match_handover,
    match_pooled,
    match_relations,
    match_tokens,
    pool_rois,
)
from bootstrap.student import weigh


def test_pooling_a_quarter_is_the_mean_of_its_patches() -> None:
    patches = torch.randn(2, 16, 5)
    rois = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5]]).expand(2, 2, 4)
    pooled = pool_rois(patches, rois, (4, 4))
    grid = patches.view(2, 4, 4, 5)
    torch.testing.assert_close(pooled[:, 0], grid[:, :2, :2].mean(dim=(1, 2)))
    torch.testing.assert_close(pooled[:, 1], grid[:, :2, 2:].mean(dim=(1, 2)))


def test_pooling_weighs_patches_by_shared_area() -> None:
    patches = torch.tensor([[[0.0], [1.0], [2.0]]])  # one row of three
    roi = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])  # the first and half of the second
    torch.testing.assert_close(pool_rois(patches, roi, (1, 3)), torch.tensor([[[1 / 3]]]))


@pytest.mark.parametrize(
    ("roi", "nearest"),
    [
        ((2.0, 0.1, 3.0, 0.2), 3),
        ((-1.0, -1.0, -0.5, -0.5), 0),
        ((0.3, 0.0, 0.3, 1.0), 1),
        ((0.3, 0.0, 0.26, 1.0), 1),
    ],
)
def test_degenerate_rois_read_the_nearest_patch(roi: tuple[float, ...], nearest: int) -> None:
    patches = torch.arange(4.0).view(1, 4, 1)
    pooled = pool_rois(patches, torch.tensor([[roi]]), (1, 4))
    torch.testing.assert_close(pooled, torch.full((1, 1, 1), float(nearest)))


def test_a_non_square_grid_keeps_rows_and_columns_apart() -> None:
    patches = torch.arange(6.0).view(1, 6, 1)  # rows (0 1 2), (3 4 5)
    lower = torch.tensor([[[0.0, 0.5, 1.0, 1.0]]])
    torch.testing.assert_close(pool_rois(patches, lower, (2, 3)), torch.full((1, 1, 1), 4.0))


def test_targets_do_not_pull_on_rois() -> None:
    rois = torch.rand(1, 3, 4, requires_grad=True)
    patches = torch.randn(1, 4, 2, requires_grad=True)
    pool_rois(patches, rois, (2, 2)).sum().backward()
    assert rois.grad is None
    assert patches.grad is not None


@pytest.mark.parametrize("objective", [match_handover, match_tokens, match_pooled])
def test_distances_are_in_units_of_the_spread(objective: object) -> None:
    target, spread = torch.randn(4, 3, 6), torch.rand(6) + 0.5
    assert objective(target, target, spread) == 0  # type: ignore[operator]
    off = target + 2 * spread
    torch.testing.assert_close(objective(off, target, spread), torch.tensor(4.0))  # type: ignore[operator]


def test_cosine_ignores_length_and_knows_opposites() -> None:
    target = torch.randn(5, 8)
    torch.testing.assert_close(align_pooled(3 * target, target), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(align_pooled(-target, target), torch.tensor(2.0))


def test_relations_are_the_divergence_over_other_pictures() -> None:
    ours, theirs = torch.randn(4, 6), torch.randn(4, 6)
    expected = torch.zeros(())
    for row in range(4):
        others = [column for column in range(4) if column != row]
        p = (
            torch.stack([F.cosine_similarity(theirs[row], theirs[c], dim=0) for c in others])
            .div(0.1)
            .softmax(0)
        )
        q = torch.stack([F.cosine_similarity(ours[row], ours[c], dim=0) for c in others]).div(0.1).softmax(0)
        expected = expected + (p * (p / q).log()).sum() / 4
    torch.testing.assert_close(match_relations(ours, theirs, 0.1), expected)
    assert match_relations(theirs, theirs) == pytest.approx(0, abs=1e-6)
    assert match_relations(ours[:1], theirs[:1]) == 0


def test_the_handover_weight_falls_linearly() -> None:
    settings = ObjectiveSettings(handover=2.0, tokens=3.0, handover_end=0.5)
    distances = {"handover": torch.tensor(1.0), "tokens": torch.tensor(1.0)}
    assert [float(weigh(distances, settings, progress)) for progress in (0.0, 0.5, 1.0)] == [5.0, 4.5, 4.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1.0}, "tokens must be a number of 0 or more"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"handover": 0.0, "warmup": 0.2}, "set handover above 0 or warmup to 0"),
        ({"handover": 0.0, "tokens": 0.0, "pooled": 0.0, "warmup": 0.0}, "nothing to learn"),
    ],
)
def test_contradictory_weights_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**settings)
