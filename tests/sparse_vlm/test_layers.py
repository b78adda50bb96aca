"""Attention in bf16 on a CPU, whose gradients go through fp32."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

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
