"""RoI geometry against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_vlm.rois import adjust_rois, build_initial_rois, encode_rois, place_points

_fraction = st.floats(-0.5, 1.5, width=32)
_roi = st.tuples(_fraction, _fraction, _fraction, _fraction)
_delta = st.tuples(*[st.floats(-1.0, 1.0, width=32)] * 4)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 130))
def test_initial_rois_lie_in_the_picture(count: int) -> None:
    rois = build_initial_rois(count, "half")
    assert rois.shape == (count, 4)
    assert rois.dtype == torch.float32
    assert rois.min() >= 0
    assert rois.max() <= 1 + 1e-6
    side = math.isqrt(count)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert (rois[side * side :] == whole).all()
    grid = rois[: side * side]
    size = 1.0 if side == 1 else 0.5
    torch.testing.assert_close(grid[:, 2:] - grid[:, :2], torch.full((side * side, 2), size))
    assert len({tuple(roi) for roi in grid.tolist()}) == side * side
    # Together they cover the picture from edge to edge.
    assert grid[:, :2].min() == 0
    assert grid[:, 2:].max() == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 130))
def test_tiles_cut_the_picture_without_rest(count: int) -> None:
    rois = build_initial_rois(count, "tiles")
    assert rois.shape == (count, 4)
    assert (rois >= 0).all()
    assert (rois <= 1).all()
    assert len({tuple(roi) for roi in rois.tolist()}) == count
    # No two overlap and together they are as large as the picture: nothing is left out.
    upper, lower = (
        torch.maximum(rois[:, None, :2], rois[:, :2]),
        torch.minimum(rois[:, None, 2:], rois[:, 2:]),
    )
    shared = (lower - upper).clamp(min=0).prod(dim=-1)
    torch.testing.assert_close(
        shared, torch.diag((rois[:, 2:] - rois[:, :2]).prod(dim=-1)), atol=1e-6, rtol=0
    )
    assert float(shared.sum()) == pytest.approx(1.0, abs=1e-5)


def test_initial_rois_of_49_tiles_are_the_cells() -> None:
    rois = build_initial_rois(49, "tiles")
    expected = [[x / 7, y / 7, (x + 1) / 7, (y + 1) / 7] for y in range(7) for x in range(7)]
    torch.testing.assert_close(rois, torch.tensor(expected))


def test_no_rois_is_refused() -> None:
    with pytest.raises(ValueError, match="num_latents must be at least 1, got 0"):
        build_initial_rois(0, "half")


@settings(max_examples=100, deadline=None)
@given(roi=_roi, delta=_delta)
def test_adjustment_moves_the_centre_and_scales_the_size(
    roi: tuple[float, ...], delta: tuple[float, ...]
) -> None:
    x1, y1, x2, y2 = roi
    new = adjust_rois(torch.tensor([[roi]]), torch.tensor([[delta]]))[0, 0].tolist()
    for low, high, new_low, new_high, shift, scale in (
        (x1, x2, new[0], new[2], delta[0], delta[2]),
        (y1, y2, new[1], new[3], delta[1], delta[3]),
    ):
        size = abs(high - low)
        assert (new_low + new_high) / 2 == pytest.approx((low + high) / 2 + shift * size, abs=1e-5)
        assert new_high - new_low == pytest.approx(size * math.exp(scale), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(roi=_roi)
def test_zero_deltas_leave_an_upright_roi_where_it_is(roi: tuple[float, ...]) -> None:
    upright = torch.tensor(
        [[min(roi[0], roi[2]), min(roi[1], roi[3]), max(roi[0], roi[2]), max(roi[1], roi[3])]]
    )
    torch.testing.assert_close(
        adjust_rois(upright[None], torch.zeros(1, 1, 4))[0], upright, atol=1e-6, rtol=0
    )


@settings(max_examples=60, deadline=None)
@given(roi=_roi, points=st.integers(2, 12), seed=st.integers(0, 99), scale=st.floats(0.1, 100.0))
def test_points_are_centred_in_the_roi_and_spread_over_a_third(
    roi: tuple[float, ...], points: int, seed: int, scale: float
) -> None:
    offsets = scale * torch.randn(1, 1, points, 2, generator=torch.Generator().manual_seed(seed))
    offsets[..., 0, :] += 3 * scale  # never all alike
    box = torch.tensor(roi)
    placed = place_points(box.view(1, 1, 4), offsets)[0, 0]
    centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    torch.testing.assert_close(placed.mean(0), centre, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(placed.std(0), size.abs() / 3, atol=1e-3, rtol=1e-3)


def test_points_do_not_depend_on_the_offsets_scale_or_place() -> None:
    rois = build_initial_rois(4, "half")[None]
    offsets = torch.randn(1, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    first = place_points(rois, offsets)
    torch.testing.assert_close(place_points(rois, 100 * offsets + 7), first, atol=1e-4, rtol=0)


def test_position_code_against_a_loop() -> None:
    width, temperature = 16, 128.0
    roi = [0.1, 0.25, 0.5, 0.9]
    quarter = width // 4
    expected = []
    for value in roi:
        waves = [temperature ** (k / (quarter - 1)) * math.pi * value for k in range(quarter)]
        expected += [math.sin(w) for w in waves[0::2]] + [math.cos(w) for w in waves[1::2]]
    code = encode_rois(torch.tensor([[roi]]), width, temperature)
    assert code.shape == (1, 1, width)
    torch.testing.assert_close(code[0, 0], torch.tensor(expected), atol=1e-4, rtol=0)


def test_position_code_passes_no_gradient() -> None:
    rois = torch.rand(1, 3, 4, requires_grad=True)
    assert not encode_rois(rois, 16, 128.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precisions_become_fp32(dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    rois = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]], dtype=dtype)
    results: list[Tensor] = [
        adjust_rois(rois, torch.zeros(1, 1, 4, dtype=dtype)),
        place_points(rois, torch.rand(1, 1, 4, 2).to(dtype)),
        encode_rois(rois, 16, 128.0),
    ]
    assert [result.dtype for result in results] == [wanted] * 3
