"""Attention in bf16 on a CPU, whose gradients go through fp32, and OpenAI's activation."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from sparse_vlm.activations import quick_gelu
from sparse_vlm.layers import attend


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradients_are_those_of_fp32_attention(autocast: bool) -> None:
    rough = [torch.randn(2, 3, 7, 8).bfloat16().requires_grad_() for _ in range(3)]
    exact = [part.detach().float().requires_grad_() for part in rough]
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        mixed = attend(*rough)
    wanted = F.scaled_dot_product_attention(*exact)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, wanted.bfloat16())
    mixed.float().square().sum().backward()
    wanted.bfloat16().float().square().sum().backward()
    for part, other in zip(rough, exact, strict=True):
        assert part.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(part.grad.float(), other.grad, atol=2e-2, rtol=2e-2)


def test_without_gradients_bf16_stays_bf16() -> None:
    parts = [torch.randn(2, 3, 7, 8).bfloat16() for _ in range(3)]
    assert torch.equal(attend(*parts), F.scaled_dot_product_attention(*parts))


def test_quick_gelu_is_its_formula_and_keeps_one_tensor() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    wanted = x * torch.sigmoid(1.702 * x)
    (gradient,) = torch.autograd.grad(wanted.sum(), x)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved) or saved, lambda saved: saved
    ):
        got = quick_gelu(x)
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], gradient, rtol=1e-13, atol=1e-13)
    assert len(kept) == 1
    before = x.detach().clone()
    with torch.no_grad():
        assert torch.equal(quick_gelu(x), got)  # in place, but not in the caller's memory
    assert torch.equal(quick_gelu(before), got)
    assert torch.equal(before, x)


def test_quick_gelu_of_the_largest_half_precision_numbers() -> None:
    ends = torch.tensor([-65504.0, -40000.0, 0.0, 40000.0, 65504.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        torch.testing.assert_close(quick_gelu(ends.to(dtype)).float(), ends.clamp(min=0), rtol=1e-2, atol=0)
