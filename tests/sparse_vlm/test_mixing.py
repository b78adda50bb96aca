"""Adaptive mixing against its definition in einsums."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sparse_vlm.fused import mix_samples
from sparse_vlm.mixing import AdaptiveMixing

WIDTH, CHANNELS, POINTS, OUT_POINTS = 16, 6, 4, 5


def _build(bias: bool) -> AdaptiveMixing:
    torch.manual_seed(0)
    mixing = AdaptiveMixing(WIDTH, CHANNELS, POINTS, OUT_POINTS, 8, bias)
    for parameter in mixing.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixing


def _decode(mixing: AdaptiveMixing, samples: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    biases = (mixing.channel_bias, mixing.point_bias)
    return mixing.out(mix_samples(samples, *mixing.generate(tokens), *biases))


@pytest.mark.parametrize("bias", [False, True])
def test_equals_its_definition(bias: bool) -> None:
    mixing = _build(bias)
    samples, tokens = torch.randn(2, 3, POINTS, CHANNELS), torch.randn(2, 3, WIDTH)
    weights = mixing.generator_out(mixing.generator_in(mixing.norm(tokens)))
    for b in range(2):
        for n in range(3):
            by_channel = weights[b, n, : CHANNELS**2].view(CHANNELS, CHANNELS)
            by_point = weights[b, n, CHANNELS**2 :].view(OUT_POINTS, POINTS)
            mixed = torch.einsum("pc,cd->pd", samples[b, n], by_channel)
            if bias:
                mixed = F.gelu(mixed + mixing.channel_bias)
            mixed = torch.einsum("qp,pd->qd", by_point, mixed)
            if bias:
                mixed = mixed + mixing.point_bias[:, None]
            expected = mixing.out(F.gelu(mixed).flatten())
            torch.testing.assert_close(_decode(mixing, samples, tokens)[b, n], expected, atol=1e-5, rtol=1e-4)


def test_starts_with_the_same_xavier_matrices_for_every_token() -> None:
    mixing = AdaptiveMixing(WIDTH, CHANNELS, POINTS, OUT_POINTS, 8, False)
    mixing.init_weights()
    samples = torch.randn(1, 1, POINTS, CHANNELS).expand(1, 3, -1, -1)
    update = _decode(mixing, samples, torch.randn(1, 3, WIDTH))
    torch.testing.assert_close(update[0, 0], update[0, 2])
    bias = mixing.generator_out.bias
    assert bias[: CHANNELS**2].abs().max() <= math.sqrt(3 / CHANNELS)
    assert bias[CHANNELS**2 :].abs().max() <= math.sqrt(6 / (POINTS + OUT_POINTS))
    assert bias.std() > 0.1
