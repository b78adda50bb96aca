"""The bilinear read-out against a loop over pixels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_vlm.sampling import sample_features


def _read(feature_map: Tensor, x: float, y: float, padding: str) -> Tensor:
    """One point of one map (C, H, W), from its definition."""
    _, height, width = feature_map.shape
    column, row = x * width - 0.5, y * height - 0.5
    if padding == "border":
        column, row = min(max(column, 0), width - 1), min(max(row, 0), height - 1)
    result = torch.zeros(feature_map.shape[0])
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                result += feature_map[:, i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return result


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (1, 6)])
def test_equals_a_loop(padding: str, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.randn(2, 3, height, width, generator=generator)
    points = torch.rand(2, 4, 5, 2, generator=generator) * 1.6 - 0.3  # some outside
    sampled = sample_features(feature_map, points, padding)
    assert sampled.shape == (2, 4, 5, 3)
    for b in range(2):
        for n in range(4):
            for p in range(5):
                x, y = points[b, n, p].tolist()
                torch.testing.assert_close(
                    sampled[b, n, p], _read(feature_map[b], x, y, padding), atol=1e-5, rtol=1e-5
                )


def test_cell_centres_read_their_cells() -> None:
    feature_map = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[[(j + 0.5) / 4, (i + 0.5) / 3] for i in range(3) for j in range(4)]]])
    torch.testing.assert_close(sample_features(feature_map, points)[0, 0, :, 0], torch.arange(12.0))


def test_gradient_of_points_is_clamped_to_one_cell() -> None:
    feature_map = 1e4 * torch.randn(1, 2, 8, 10, generator=torch.Generator().manual_seed(0))
    gradients = {}
    for clip in (False, True):
        points = torch.full((1, 1, 3, 2), 0.37, requires_grad=True)
        sample_features(feature_map, points, "zeros", clip_gradients=clip).sum().backward()
        gradients[clip] = points.grad
    assert gradients[False].abs().min() > 1 / 8
    torch.testing.assert_close(gradients[True], gradients[False].clamp(-1 / 8, 1 / 8))


def test_arithmetic_is_fp32_and_result_has_the_maps_dtype() -> None:
    feature_map = torch.randn(1, 2, 56, 56, generator=torch.Generator().manual_seed(0)).bfloat16()
    points = torch.rand(1, 3, 4, 2, generator=torch.Generator().manual_seed(1))
    sampled = sample_features(feature_map, points)
    assert sampled.dtype == torch.bfloat16
    assert torch.equal(sampled, sample_features(feature_map.float(), points).bfloat16())


def test_coordinates_that_are_not_numbers_do_not_crash_the_gradient() -> None:
    feature_map = torch.rand(1, 2, 4, 4, requires_grad=True)
    points = torch.tensor([[[[float("nan"), 0.5], [float("inf"), 0.5], [0.5, float("-inf")], [1e30, -1e30]]]])
    points.requires_grad_(True)
    for padding in ("border", "zeros"):
        sample_features(feature_map, points, padding).sum().backward()
    assert feature_map.grad is not None
    assert feature_map.grad.isfinite().all()
