"""What can be counted without a clock: tokens, parameters, multiply-adds, cache bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bootstrap.cost import count_work
from eval.costs.shapes import Subject
from sparse_vlm import SparseFormerConfig


@dataclass(frozen=True)
class Counts:
    """Of one question about one picture.

    Attributes:
        visual_tokens: The language model reads for the picture.
        prompt_tokens: Visual ones and words together.
        tower_parameters: Of the vision tower.
        projector_parameters: Of the projector.
        llm_parameters: Of the language model.
        tower_gmacs: Billions of multiply-adds.
        projector_gmacs: Billions of multiply-adds.
        prefill_gmacs: The language model's, until its first token.
        cache_bytes: Of keys and values after the prompt.
    """

    visual_tokens: int
    prompt_tokens: int
    tower_parameters: int
    projector_parameters: int
    llm_parameters: int
    tower_gmacs: float
    projector_gmacs: float
    prefill_gmacs: float
    cache_bytes: int

    @property
    def total_gmacs(self) -> float:
        """Until the first token."""
        return self.tower_gmacs + self.projector_gmacs + self.prefill_gmacs


def count_costs(subject: Subject, words: int) -> Counts:
    """Counts everything on the subject's device; the meta device will do.

    Args:
        subject: What to count.
        words: Tokens of the prompt besides the picture's.
    """
    model = subject.model
    weight = next(model.parameters())
    pixels = torch.zeros(1, 3, *subject.image_size, device=weight.device, dtype=weight.dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # the counter trips over parameters with gradients
    both = count_work(lambda: subject.see(pixels))
    tokens = torch.zeros(
        1, subject.tokens, model.config.vision_config.hidden_size, device=weight.device, dtype=weight.dtype
    )
    projector = count_work(lambda: model.model.multi_modal_projector(tokens))
    length = subject.tokens + words
    width = model.config.text_config.hidden_size
    embeddings = torch.zeros(1, length, width, device=weight.device, dtype=weight.dtype)
    prefill = count_work(
        lambda: model.lm_head(model.model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1:])
    )
    parts = {"tower": 0, "projector": 0, "llm": 0}
    for name, parameter in model.named_parameters():
        part = "tower" if "vision_tower" in name else "projector" if "projector" in name else "llm"
        parts[part] += parameter.numel()
    return Counts(
        visual_tokens=subject.tokens,
        prompt_tokens=length,
        tower_parameters=parts["tower"],
        projector_parameters=parts["projector"],
        llm_parameters=parts["llm"],
        tower_gmacs=both - projector,
        projector_gmacs=projector,
        prefill_gmacs=prefill,
        cache_bytes=cache_bytes(model.config.text_config, length, weight.element_size()),
    )


def cache_bytes(text: Any, tokens: int, bytes_a_number: int) -> int:
    """Keys and values of one sequence: two tensors a layer, (heads, tokens, head width)."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * tokens * bytes_a_number


def vit_gmacs(config: Any) -> float:
    """A CLIP ViT's multiply-adds by hand: patch embedding, and a block's projections, MLP and attention."""
    patches = (config.image_size // config.patch_size) ** 2
    tokens, width = patches + 1, config.hidden_size
    embedding = patches * 3 * config.patch_size**2 * width
    block = tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 2 * tokens**2 * width
    return float((embedding + config.num_hidden_layers * block) / 1e9)


def projector_gmacs(width: int, llm_width: int, tokens: int) -> float:
    """LLaVA's two linear layers by hand."""
    return tokens * (width * llm_width + llm_width**2) / 1e9


def sparseformer_gmacs(config: SparseFormerConfig, side: int, tokens: int) -> float:
    """A SparseFormer's multiply-adds by hand: stem, focusing steps, hand-over, cortex.

    Bilinear read-out is a few additions and multiplications a number and not a matrix product; neither this
    formula nor the counters count it.

    Args:
        config: The architecture.
        side: Of its square pictures in pixels.
        tokens: It makes, the class token included.
    """
    stem = (side // 2) ** 2 * 49 * 3 * config.stem_channels
    latents = tokens - int(config.cls_token)
    narrow, wide = config.focusing_width, config.width
    focusing = config.focusing_repeats * _step_macs(
        config, config.focusing_order, latents, narrow, config.focusing_mlp_width, config.generator_width
    )
    handover = latents * narrow * wide + _step_macs(
        config, config.handover_order, latents, wide, config.mlp_width, config.handover_generator_width
    )
    block = tokens * (4 * wide**2 + 2 * wide * config.mlp_width) + 2 * tokens**2 * wide
    return float((stem + focusing + handover + config.depth * block) / 1e9)


def _step_macs(
    config: SparseFormerConfig, order: Sequence[str], tokens: int, width: int, mlp: int, generator: int
) -> int:
    """Of one focusing step."""
    points, channels, out = config.num_points, config.stem_channels, config.mixing_points
    place = width * 2 * points
    generate = width * generator + generator * (channels**2 + out * points)
    mix = points * channels**2 + out * points * channels + out * channels * width
    macs = {
        "sample": tokens * (place + generate + mix),
        "position": tokens * width**2,
        "attention": tokens * 4 * width**2 + 2 * tokens**2 * width,
        "mlp": tokens * 2 * width * mlp,
        "adjust": tokens * (width**2 * int(config.adjust_hidden) + 4 * width),
    }
    return sum(macs[operation] for operation in order)


def prefill_gmacs(text: Any, tokens: int) -> float:
    """A Llama's multiply-adds by hand, until the logits of the last token.

    Attention is counted in full, as the counter does, although a causal mask needs half of it.
    """
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    projections = 2 * width * heads * head + 2 * width * text.num_key_value_heads * head
    block = tokens * (projections + 3 * width * text.intermediate_size) + 2 * tokens**2 * heads * head
    return float((text.num_hidden_layers * block + width * text.vocab_size) / 1e9)
