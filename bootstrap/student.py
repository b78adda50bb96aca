"""The student in training: the encoder, and how far it is from the teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_vlm.encoder import EncoderOutput, SparseFormer

from .config import ObjectiveSettings
from .objectives import align_pooled, match_handover, match_pooled, match_relations, match_tokens, pool_rois


class Targets(NamedTuple):
    """What the teacher said about a batch.

    Attributes:
        mid: (B, P, D) patch tokens entering the student's first cortex block.
        tokens: (B, P, D) final normalised patch tokens; None during the warm-up.
        pooled: (B, E); None during the warm-up.
    """

    mid: Tensor
    tokens: Tensor | None
    pooled: Tensor | None


class Spreads(NamedTuple):
    """Standard deviation per channel of each kind of target: the units of the squared distances.

    Attributes:
        mid: (D,).
        tokens: (D,).
        pooled: (E,).
    """

    mid: Tensor
    tokens: Tensor
    pooled: Tensor


class Student(nn.Module):
    """An encoder whose forward pass returns its distances from the teacher.

    Args:
        encoder: the SparseFormer.
        settings: weights of the objectives.
        spreads: units of the squared distances.
        grid: (h, w) of the teacher's patches.
    """

    mid_spread: Tensor
    tokens_spread: Tensor
    pooled_spread: Tensor

    def __init__(
        self, encoder: SparseFormer, settings: ObjectiveSettings, spreads: Spreads, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.settings = settings
        self.grid = grid
        for name, spread in spreads._asdict().items():
            self.register_buffer(f"{name}_spread", spread, persistent=False)

    def forward(self, images: Tensor, targets: Targets, num_tokens: int | None = None) -> dict[str, Tensor]:
        """Distances from the teacher on a batch.

        Args:
            images: (B, 3, H, W).
            targets: the teacher's; without final tokens (the warm-up) the focusing transformer runs alone.
            num_tokens: tokens per picture, class token included; the architecture's own by default.

        Returns:
            A scalar for each objective that has a weight, under the name of that weight in
            :class:`bootstrap.config.ObjectiveSettings`.
        """
        if targets.tokens is None or targets.pooled is None:
            focus = self.encoder.focus(images, num_tokens)
            # As the joint phase compares them: on their way into the first block.
            entering = self.encoder.cortex.entry_norm(focus.tokens)
            with _in_fp32(images):
                return {"handover": self._handover(entering, targets.mid, self._regions(focus.rois))}
        output = self.encoder(images, num_tokens, hidden_states=True)
        with _in_fp32(images):
            return self._compare(output, targets.mid, targets.tokens, targets.pooled)

    def _compare(
        self, output: EncoderOutput, mid: Tensor, tokens: Tensor, pooled: Tensor
    ) -> dict[str, Tensor]:
        """The distances of the joint phase."""
        weights = self.settings
        latents = slice(int(self.encoder.config.cls_token), None)
        regions = self._regions(output.rois)
        distances: dict[str, Tensor] = {}
        if weights.handover > 0 and output.hidden_states is not None:
            distances["handover"] = self._handover(output.hidden_states[0][:, latents], mid, regions)
        if weights.tokens > 0:
            wanted = pool_rois(tokens.float(), regions, self.grid)
            distances["tokens"] = match_tokens(output.tokens[:, latents], wanted, self.tokens_spread)
        if weights.pooled_cosine > 0:
            distances["pooled_cosine"] = align_pooled(output.pooled, pooled)
        if weights.pooled > 0:
            distances["pooled"] = match_pooled(output.pooled, pooled, self.pooled_spread)
        if weights.relations > 0:
            distances["relations"] = match_relations(output.pooled, pooled)
        return distances

    def _regions(self, rois: tuple[Tensor, ...]) -> Tensor:
        return rois[0] if self.settings.regions == "start" else rois[-1]

    def _handover(self, handover: Tensor, mid: Tensor, rois: Tensor) -> Tensor:
        return match_handover(handover, pool_rois(mid.float(), rois, self.grid), self.mid_spread)


def _in_fp32(images: Tensor) -> torch.autocast:
    """Without the encoder's autocast, which would round targets and similarities to bf16 in every product."""
    return torch.autocast(images.device.type, enabled=False)


def weigh(distances: dict[str, Tensor], settings: ObjectiveSettings, progress: float) -> Tensor:
    """The loss: the weighted sum of the distances.

    Args:
        distances: from :class:`Student`.
        settings: the weights.
        progress: share of the run done after the warm-up, 0 to 1; the hand-over weight falls with it.
    """
    weights = {name: getattr(settings, name) for name in distances}
    if "handover" in weights:
        weights["handover"] *= 1.0 + (settings.handover_end - 1.0) * progress
    return torch.stack([weights[name] * distance for name, distance in distances.items()]).sum()
