"""Adaptive mixing: each token decodes its samples with weights generated from the token itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .fused import Sight, look


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

    def forward(
        self,
        feature_map: Tensor,
        points_xy: Tensor,
        tokens: Tensor,
        padding: str = "border",
        clip_gradients: bool = False,
    ) -> Tensor:
        """Read the feature map at the tokens' points and decode what was read into a token update.

        Args:
            feature_map: (B, C, H, W).
            points_xy: (B, N, P, 2), fractions of the picture.
            tokens: (B, N, D).
            padding: see :func:`sparse_vlm.sampling.sample_features`.
            clip_gradients: see there.

        Returns:
            (B, N, D).
        """
        matrices = self.generate(tokens)
        sight = Sight(feature_map, points_xy, *matrices, self.channel_bias, self.point_bias)
        return self.out(look(sight, padding, clip_gradients))

    def generate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The two matrices of every token (B, N, D): (B, N, C, C) and (B, N, Q, P)."""
        generated = self.generator_out(self.generator_in(self.norm(tokens)))
        # One split, not two slices: the gradient of a slice is a zero-filled copy of the whole.
        by_channel, by_point = generated.split(
            (self.channels * self.channels, self.mixing_points * self.num_points), dim=-1
        )
        return (
            by_channel.unflatten(-1, (self.channels, self.channels)),  # (B, N, C, C)
            by_point.unflatten(-1, (self.mixing_points, self.num_points)),  # (B, N, Q, P)
        )
