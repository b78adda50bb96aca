"""Towers and language models of known shape, with random weights, or on the meta device for counting."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from eval.answers import InputError
from llm_integration.hf import SparseFormerVisionConfig
from llm_integration.load import load_llava
from llm_integration.processor import count_image_tokens, load_processor, measure_pictures
from sparse_vlm import load_encoder
from sparse_vlm.presets import load_preset


@dataclass(frozen=True)
class TowerShape:
    """A vision tower.

    Attributes:
        name: As on the command line.
        label: As printed.
        image_size: Height and width of its pictures in pixels.
        tokens: It hands to the language model (a ViT's class token is dropped, as LLaVA does).
        config: transformers' configuration of the tower.
        layer: Hidden state that LLaVA reads.
        drops_first: Whether LLaVA drops the first token.
    """

    name: str
    label: str
    image_size: tuple[int, int]
    tokens: int
    config: Any
    layer: int
    drops_first: bool


def _vit(name: str, label: str, size: int, patch: int, width: int, depth: int, heads: int) -> TowerShape:
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch,
        hidden_act="quick_gelu",
    )
    return TowerShape(name, label, (size, size), (size // patch) ** 2, config, -2, True)


def _sparseformer(name: str, label: str, preset: str, tokens: int) -> TowerShape:
    architecture, transform = load_preset(preset)
    config = SparseFormerVisionConfig(
        architecture=architecture.to_dict(),
        num_tokens=tokens,
        pooling_head=False,
        transform=transform.to_dict(),
    )
    return TowerShape(name, label, (transform.height, transform.width), tokens, config, -1, False)


_LARGE, _BASE = "sparseformer_btsp_openai_clip_large", "sparseformer_btsp_openai_clip_base"


def list_towers() -> dict[str, TowerShape]:
    """The towers that can be named, by name."""
    shapes = (
        _vit("vit_b_16", "CLIP ViT-B/16", 224, 16, 768, 12, 12),
        _vit("vit_l_14", "CLIP ViT-L/14", 224, 14, 1024, 24, 16),
        _vit("vit_l_14_336", "CLIP ViT-L/14-336", 336, 14, 1024, 24, 16),
        _sparseformer("sf_b_49", "SparseFormer base, 49", _BASE, 49),
        _sparseformer("sf_l_49", "SparseFormer large, 49", _LARGE, 49),
        _sparseformer("sf_l_64", "SparseFormer large, 64", _LARGE, 64),
    )
    return {shape.name: shape for shape in shapes}


@functools.cache
def list_llms() -> dict[str, LlamaConfig]:
    """Llama-shaped language models by size."""

    def llama(width: int, mlp: int, depth: int, heads: int, groups: int, vocabulary: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=4096,
        )

    return {
        "tiny": llama(256, 704, 4, 4, 4, 2048),
        "0.5b": llama(1280, 3520, 21, 20, 20, 32064),
        "1.5b": llama(2048, 5632, 27, 16, 16, 32064),
        "7b": llama(4096, 11008, 32, 32, 32, 32064),
        "13b": llama(5120, 13824, 40, 40, 40, 32064),
    }


@dataclass(frozen=True)
class Subject:
    """A whole LLaVA to be measured.

    Attributes:
        name: As given on the command line.
        model: The LLaVA; its tower is `model.model.vision_tower`.
        image_size: Height and width of its pictures in pixels.
        tokens: Visual tokens of a picture.
        llm: Shape of its language model, if that is one of `list_llms` with random weights.
    """

    name: str
    model: Any
    image_size: tuple[int, int]
    tokens: int
    llm: LlamaConfig | None = None

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        tower: nn.Module = self.model.model.vision_tower
        return tower

    def see(self, pixels: Tensor) -> Tensor:
        """Visual tokens in the language model's space.

        Args:
            pixels: (B, 3, H, W).

        Returns:
            (B, N, D).
        """
        return torch.stack(list(self.model.get_image_features(pixel_values=pixels).pooler_output))


def label_subjects(names: Sequence[str]) -> dict[str, str]:
    """What towers and directories are called in tables; of paths so much of the end as tells them apart."""
    towers = list_towers()
    tails = {name: Path(name).parts[::-1] for name in names if name not in towers}
    labels = {name: towers[name].label for name in names if name in towers}
    for name, tail in tails.items():
        others = [other for place, other in tails.items() if place != name]
        length = 1
        while length < len(tail) and any(other[:length] == tail[:length] for other in others):
            length += 1
        labels[name] = "/".join(tail[:length][::-1])
    return labels


def build_subject(
    name: str, llm: str, device: str, dtype: torch.dtype, lenders: Sequence[Subject] = ()
) -> Subject:
    """A LLaVA by the name of its tower, from an encoder directory, or from a LLaVA directory.

    Args:
        name: One of `list_towers`, or a directory.
        llm: One of `list_llms`; not looked at for a LLaVA directory.
        device: "meta" makes no weights: enough for counting.
        dtype: Of the weights.
        lenders: Built before with the same `llm`; one of them lends its language model. A LLaVA directory
            keeps its own and lends none.

    Raises:
        InputError: If the name is none of these, or its directory holds another model or a broken one.
    """
    towers, llms = list_towers(), list_llms()
    if llm not in llms:
        raise InputError(f"There is no language model {llm!r}; known are {', '.join(llms)}.")
    if name in towers:
        return _assemble(towers[name], llms[llm], device, dtype, lenders)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"There is no tower {name!r}: name one of {', '.join(towers)}, an encoder directory, or a LLaVA "
            "directory."
        )
    try:
        if (folder / "processor_config.json").is_file():
            loaded: Any = load_llava(folder, dtype)
            model = loaded.to(device)
            processor = load_processor(folder)
            size = measure_pictures(processor)
            return Subject(name, model.eval(), size, count_image_tokens(processor))
        encoder = load_encoder(folder)
    except ValueError as error:
        raise InputError(str(error)) from error
    config = SparseFormerVisionConfig(
        architecture=encoder.config.to_dict(),
        pooling_head=False,
        transform=encoder.transform.config.to_dict(),
    )
    transform = encoder.transform.config
    size = transform.height, transform.width
    shape = TowerShape(name, folder.name, size, encoder.num_tokens, config, -1, False)
    return _assemble(shape, llms[llm], device, dtype, lenders)


def _assemble(
    shape: TowerShape, llm: LlamaConfig, device: str, dtype: torch.dtype, lenders: Sequence[Subject]
) -> Subject:
    lender = next((lent for lent in lenders if lent.llm is llm), None)
    text = llm
    if lender is not None:
        text = copy.deepcopy(llm)
        text.num_hidden_layers = 1  # thrown away below
    config = LlavaConfig(
        vision_config=shape.config,
        text_config=text,
        image_token_index=llm.vocab_size - 1,
        image_seq_length=shape.tokens,
        vision_feature_layer=shape.layer,
        vision_feature_select_strategy="default" if shape.drops_first else "full",
    )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model: Any = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    if lender is not None:
        model.model.language_model, model.lm_head = lender.model.model.language_model, lender.model.lm_head
        model.config.text_config = llm
    return Subject(shape.name, model.eval(), shape.image_size, shape.tokens, llm)
