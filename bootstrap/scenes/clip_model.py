"""The small CLIP itself: open_clip's model from a configuration, and its directory on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch.nn import functional as F

from bootstrap.scenes.clip_texts import vocabulary, write_tokenizer, write_zeroshot
from sparse_vlm.atomic import write_atomic

WEIGHTS = "open_clip_model.safetensors"


@dataclass(frozen=True)
class ClipModelConfig:
    """Sizes of both towers, in open_clip's words."""

    embed_dim: int = 128
    image_size: int = 96
    patch_size: int = 8
    width: int = 128
    layers: int = 9
    head_width: int = 32
    mlp_ratio: float = 2.0
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 24


def open_clip_config(config: ClipModelConfig) -> dict[str, Any]:
    """The content of `open_clip_config.json`."""
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.width,
            "layers": config.layers,
            "head_width": config.head_width,
            "mlp_ratio": config.mlp_ratio,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": len(vocabulary()),
            "hf_tokenizer_name": "scenes",
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }
    preprocess = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def build_clip(config: ClipModelConfig, image_size: int | None = None) -> CLIP:
    """Random-initialised model; another `image_size` changes the position table only."""
    cfg = open_clip_config(config)["model_cfg"]
    text = {key: value for key, value in cfg["text_cfg"].items() if key != "hf_tokenizer_name"}
    vision = {**cfg["vision_cfg"], "image_size": image_size or config.image_size}
    return CLIP(cfg["embed_dim"], vision, text, quick_gelu=True)


def enlarge(state: dict[str, torch.Tensor], model: CLIP) -> dict[str, torch.Tensor]:
    """The state of a model for small pictures, with its position table stretched to the one of `model`."""
    key = "visual.positional_embedding"
    side, grid = math.isqrt(len(state[key]) - 1), math.isqrt(len(model.visual.positional_embedding) - 1)
    patches = state[key][1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, side, side)
    stretched = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    table = torch.cat([state[key][:1], stretched[0].flatten(1).T])  # (1 + grid * grid, D)
    return {**state, key: table}


def write_description(directory: Path, config: ClipModelConfig) -> None:
    """Writes everything but the weights: open_clip's configuration, tokenizer, class names."""
    text = json.dumps(open_clip_config(config), indent=2)
    write_atomic(directory / "open_clip_config.json", text + "\n")
    write_tokenizer(directory)
    write_zeroshot(directory)


def save_clip(directory: Path, model: CLIP, config: ClipModelConfig) -> None:
    """Writes open_clip's local directory, with fp16 weights."""
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    write_atomic(directory / WEIGHTS, lambda path: save_file(state, path, {"format": "pt"}))
    write_description(directory, config)
