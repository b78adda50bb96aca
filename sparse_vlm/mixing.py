"""Adaptive mixing: each token decodes its samples with weights generated from the token itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptiveMixing(nn.Module):
    """Mix sampled features over channels, then over points, then map them to the token width.

    From *SparseFormer* (arXiv 2304.03768), after AdaMixer. With P points of C channels and Q mixing points,
    one token generates a C x C and a Q x P matrix.

    Args:
        width: token width D.
        channels: channels C of a sample.
        num_points: points P per token.
        mixing_points: output points Q.
        generator_width: hidden width of the generator.
        bias: learned biases with an activation between the two steps (v1 models); without it the two
            matrix products follow one another and one activation closes them.
        norm_eps: epsilon of the generator's layer norm.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        num_points: int,
        mixing_points: int,
        generator_width: int,
        bias: bool,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.channels, self.num_points, self.mixing_points = channels, num_points, mixing_points
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.generator_in = nn.Linear(width, generator_width)
        self.generator_out = nn.Linear(generator_width, channels * channels + mixing_points * num_points)
        self.channel_bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.point_bias = nn.Parameter(torch.zeros(mixing_points)) if bias else None
        self.out = nn.Linear(mixing_points * channels, width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start with the same Xavier-uniform mixing matrices for every token.

        The generator's last layer begins at zero, so its bias holds the matrices; its layer norm begins at
        unit length (gain D^-1/2), so that the first steps change them slowly.
        """
        for linear in (self.generator_in, self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.norm.weight, self.norm.weight.shape[0] ** -0.5)
        nn.init.zeros_(self.norm.bias)
        nn.init.zeros_(self.generator_out.weight)
        split = self.channels * self.channels
        limit = math.sqrt(3.0 / self.channels)
        self.generator_out.bias[:split].uniform_(-limit, limit)
        limit = math.sqrt(6.0 / (self.num_points + self.mixing_points))
        self.generator_out.bias[split:].uniform_(-limit, limit)
        for bias in (self.channel_bias, self.point_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, samples: Tensor, tokens: Tensor) -> Tensor:
        """Decode samples into a token update.

        Args:
            samples: (B, N, P, C).
            tokens: (B, N, D).

        Returns:
            (B, N, D).
        """
        batch, count = tokens.shape[:2]
        generated = self.generator_out(self.generator_in(self.norm(tokens)))
        # One split, not two slices: the gradient of a slice is a zero-filled copy of the whole.
        by_channel, by_point = generated.split(
            (self.channels * self.channels, self.mixing_points * self.num_points), dim=-1
        )
        by_channel = by_channel.reshape(batch * count, self.channels, self.channels)  # (BN, C, C)
        by_point = by_point.reshape(batch * count, self.mixing_points, self.num_points)  # (BN, Q, P)
        mixed = samples.reshape(batch * count, self.num_points, self.channels)  # (BN, P, C)
        if self.channel_bias is not None and self.point_bias is not None:
            mixed = F.gelu(torch.bmm(mixed, by_channel) + self.channel_bias)
            mixed = torch.bmm(by_point, mixed) + self.point_bias.unsqueeze(-1)
        else:
            mixed = torch.bmm(by_point, torch.bmm(mixed, by_channel))
        mixed = F.gelu(mixed).reshape(batch, count, self.mixing_points * self.channels)  # (B, N, QC)
        return self.out(mixed)
