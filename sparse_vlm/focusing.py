"""The focusing transformer: latent tokens that look, mix, attend, and move where they look."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import SparseFormerConfig
from .layers import Attention, Mlp, init_linear, init_modules
from .mixing import AdaptiveMixing
from .norms import add_norm
from .roi_steps import adjust_rois, encode_rois, place_points
from .rois import at_least_fp32, build_initial_rois


class Focus(NamedTuple):
    """What the focusing transformer hands to the cortex.

    Attributes:
        tokens: (B, N, D) at cortex width.
        rois: one (B, N, 4) tensor per sampling step, in order: where each token looked, xyxy fractions.
        points: one (B, N, P, 2) tensor per sampling step: the points it read, xy fractions.
    """

    tokens: Tensor
    rois: tuple[Tensor, ...]
    points: tuple[Tensor, ...]


class _Look(NamedTuple):
    tokens: Tensor
    rois: Tensor
    looked_rois: Tensor
    looked_points: Tensor


class FocusingStage(nn.Module):
    """The operations of one focusing step at one width.

    Args:
        config: the architecture.
        handover: build the stage of the hand-over (cortex width) instead of the repeated one.
    """

    def __init__(self, config: SparseFormerConfig, handover: bool) -> None:
        super().__init__()
        eps = config.focusing_norm_eps
        self.order = config.handover_order if handover else config.focusing_order
        self.num_points = config.num_points
        self.padding = config.sampling_padding
        self.clip_point_gradients = config.clip_point_gradients
        self.temperature = config.position_temperature
        self.width = width = config.width if handover else config.focusing_width

        self.offset_norm = nn.LayerNorm(width, eps=eps)
        self.offset = nn.Linear(width, 2 * config.num_points, bias=False)
        self.offset_bias = nn.Parameter(torch.empty(config.num_points, 2))
        self.mixing = AdaptiveMixing(
            width,
            config.stem_channels,
            config.num_points,
            config.mixing_points,
            config.handover_generator_width if handover else config.generator_width,
            config.mixing_bias,
        )
        if "position" in self.order:
            self.position_norm = nn.LayerNorm(width, eps=eps)
            self.position = nn.Linear(width, width)
        if "attention" in self.order:
            self.norm1 = nn.LayerNorm(width, eps=eps)
            self.attn = Attention(width, config.heads if handover else config.focusing_heads)
        if "mlp" in self.order:
            self.norm2 = nn.LayerNorm(width, eps=eps)
            self.mlp = Mlp(
                width,
                config.mlp_width if handover else config.focusing_mlp_width,
                config.activation if handover else "gelu",
            )
        if "adjust" in self.order:
            self.adjust_norm = nn.LayerNorm(width, eps=eps)
            self.adjust_hidden = nn.Linear(width, width) if config.adjust_hidden else None
            self.adjust = nn.Linear(width, 4, bias=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Points start on a grid, RoIs stand still, mixing is the same for all tokens."""
        init_modules(self)
        self.mixing.init_weights()
        nn.init.constant_(self.offset_norm.weight, self.width**-0.5)
        nn.init.zeros_(self.offset.weight)
        side = math.isqrt(self.num_points)
        if side * side == self.num_points:
            centre = (torch.arange(side, dtype=torch.float32) + 0.5) / side - 0.5
            y, x = torch.meshgrid(centre, centre, indexing="ij")
            self.offset_bias.copy_(torch.stack((x, y), dim=-1).reshape(-1, 2))
        else:
            self.offset_bias.uniform_(-0.5, 0.5)
        if "adjust" in self.order:
            nn.init.constant_(self.adjust_norm.weight, self.width**-0.5)
            nn.init.zeros_(self.adjust.weight)

    def forward(self, feature_map: Tensor, tokens: Tensor, rois: Tensor) -> _Look:
        """Run the operations in order on tokens (B, N, D) with RoIs (B, N, 4)."""
        looked_rois, looked_points = rois, rois
        update: Tensor | None = None  # of the operation before, until a norm adds it
        for operation in self.order:
            if operation == "sample":
                tokens, normed = add_norm(tokens, update, self.offset_norm)
                looked_rois, looked_points = rois, self.place(normed, rois)
                update = self.mixing(
                    feature_map, looked_points, tokens, self.padding, self.clip_point_gradients
                )
            elif operation == "position":
                tokens = tokens if update is None else tokens + update
                code = encode_rois(rois, self.width, self.temperature, tokens.dtype)
                update = self.position(self.position_norm(code))
            elif operation == "attention":
                tokens, normed = add_norm(tokens, update, self.norm1)
                update = self.attn(normed)
            elif operation == "mlp":
                tokens, normed = add_norm(tokens, update, self.norm2)
                update = self.mlp(normed)
            else:
                tokens, hidden = add_norm(tokens, update, self.adjust_norm)
                update = None
                if self.adjust_hidden is not None:
                    hidden = F.gelu(self.adjust_hidden(hidden))
                rois = adjust_rois(rois, self.adjust(hidden))
        return _Look(tokens if update is None else tokens + update, rois, looked_rois, looked_points)

    def place(self, normed: Tensor, rois: Tensor) -> Tensor:
        """The sampling points (B, N, P, 2) of normalised tokens (B, N, D) with RoIs (B, N, 4)."""
        offsets = self.offset(normed).unflatten(-1, (self.num_points, 2))  # (B, N, P, 2)
        return place_points(rois, offsets, self.offset_bias)


class FocusingTransformer(nn.Module):
    """Latent tokens and the steps that focus them, from the feature map to the cortex.

    One stage runs ``focusing_repeats`` times with shared weights; a learned vector tells the repeats apart.
    Then a linear map lifts the tokens to the cortex width, where they look once more.

    Args:
        config: the architecture.
    """

    def __init__(self, config: SparseFormerConfig) -> None:
        super().__init__()
        self.num_latents = config.num_latents
        self.repeats = config.focusing_repeats
        self.layout = config.initial_rois
        self.grad_checkpointing = False
        self.per_token = config.token_embedding == "per_token"
        own = config.num_latents if self.per_token else 1
        self.token_embedding = nn.Parameter(torch.empty(own, config.focusing_width))
        self.initial_rois = (
            nn.Parameter(torch.empty(config.num_latents, 4)) if config.initial_rois_learned else None
        )
        self.stage = FocusingStage(config, handover=False)
        self.stage_embedding = (
            nn.Parameter(torch.empty(config.focusing_repeats, config.focusing_width))
            if config.stage_embedding
            else None
        )
        self.lift = nn.Linear(config.focusing_width, config.width)
        self.lift_norm = (
            nn.LayerNorm(config.width, eps=config.focusing_norm_eps)
            if config.handover_norm
            else nn.Identity()
        )
        self.handover = FocusingStage(config, handover=True)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise everything below, in place."""
        self.stage.init_weights()
        self.handover.init_weights()
        init_linear(self.lift)
        init_modules(self.lift_norm)
        nn.init.trunc_normal_(self.token_embedding, std=1.0)
        if self.stage_embedding is not None:
            nn.init.trunc_normal_(self.stage_embedding, std=1.0)
        if self.initial_rois is not None:
            self.initial_rois.copy_(build_initial_rois(self.num_latents, self.layout))

    def start(self, batch: int, num_latents: int) -> tuple[Tensor, Tensor]:
        """The tokens (B, N, D) and RoIs (B, N, 4) before the first look.

        Raises:
            ValueError: if every token has its own embedding and another count is asked for.
        """
        own, width = self.token_embedding.shape
        if self.per_token and num_latents != own:
            raise ValueError(
                f"this encoder learned one embedding for each of its {own} latent tokens and cannot run with "
                f"{num_latents}; encoders with token_embedding='shared' can"
            )
        if self.initial_rois is not None and num_latents == self.num_latents:
            rois = at_least_fp32(self.initial_rois)
        else:
            rois = build_initial_rois(num_latents, self.layout, device=self.token_embedding.device)
        return (
            self.token_embedding.expand(batch, num_latents, width),
            # Its own memory: they go out with the result, and a caller may scale them in place.
            rois.expand(batch, num_latents, 4).clone(),
        )

    def forward(self, feature_map: Tensor, num_latents: int) -> Focus:
        """Focus ``num_latents`` tokens on a feature map (B, C, H, W)."""
        tokens, rois = self.start(feature_map.shape[0], num_latents)
        looked_rois, looked_points = [], []
        for repeat in range(self.repeats):
            if self.stage_embedding is not None:
                tokens = tokens + self.stage_embedding[repeat]
            look = self._run(self.stage, feature_map, tokens, rois)
            tokens, rois = look.tokens, look.rois
            looked_rois.append(look.looked_rois)
            looked_points.append(look.looked_points)
        look = self._run(self.handover, feature_map, self.lift_norm(self.lift(tokens)), rois)
        looked_rois.append(look.looked_rois)
        looked_points.append(look.looked_points)
        return Focus(look.tokens, tuple(looked_rois), tuple(looked_points))

    def _run(self, stage: Callable[..., _Look], *inputs: Tensor) -> _Look:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)
