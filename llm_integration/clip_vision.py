"""A whole CLIP ViT as a LLaVA's vision tower: what a SparseFormer is compared with.

Reads transformers' format, and open_clip's (plain ViTs), without open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from sparse_vlm import TransformConfig
from sparse_vlm.preprocessor import from_preprocessor_dict

from .load import read_json

_OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors")
# Of a tower: open_clip's name, transformers' name. Of its blocks: the same, after the block's number.
_TOWER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_DROPPED = ("proj",)  # the projection into the joint space: LLaVA reads tokens
_NEEDED = {"image_size", "patch_size", "width", "layers"}
_KNOWN = _NEEDED | {"head_width", "mlp_ratio", "patch_dropout"}


def is_open_clip(folder: Path) -> bool:
    """Whether a directory is in open_clip's format."""
    return all((folder / name).is_file() for name in _OPEN_CLIP)


def load_clip_vision(directory: str | Path) -> tuple[CLIPVisionModel, TransformConfig]:
    """A CLIP vision tower and its image transform, from a directory in transformers' or open_clip's format.

    Raises:
        ValueError: if the directory holds neither, or a ViT that is no plain CLIP.
    """
    folder = Path(directory)
    if is_open_clip(folder):
        return _load_open_clip(folder)
    if not (folder / "config.json").is_file() or not (folder / "preprocessor_config.json").is_file():
        raise ValueError(
            f"{folder} holds no CLIP: expected config.json with preprocessor_config.json (transformers), or "
            f"{' with '.join(_OPEN_CLIP)} (open_clip)"
        )
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{folder} holds a {kind!r} model, expected a CLIP")
    loaded: Any = CLIPVisionModel.from_pretrained(
        str(folder), output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: these weights are missing: {', '.join(sorted(report['missing_keys'])[:8])}"
        )
    described = folder / "preprocessor_config.json"
    return model.eval(), from_preprocessor_dict(read_json(described), str(described))


def _load_open_clip(folder: Path) -> tuple[CLIPVisionModel, TransformConfig]:
    described = read_json(folder / _OPEN_CLIP[0])
    try:
        model_config, pixels = described["model_cfg"], described.get("preprocess_cfg", {})
        vision, embedding_width = model_config["vision_cfg"], model_config["embed_dim"]
        lacking = sorted(_NEEDED - set(vision))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / _OPEN_CLIP[0]} describes no CLIP: {error}") from None
    if lacking:
        raise ValueError(f"{folder / _OPEN_CLIP[0]}: its vision_cfg lacks {', '.join(lacking)}")
    strange = sorted(set(vision) - _KNOWN)
    if strange or not isinstance(vision["layers"], int):
        raise ValueError(f"{folder}: no plain CLIP ViT ({', '.join(strange) or 'layers'} in its vision_cfg)")
    width = vision["width"]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
        num_hidden_layers=vision["layers"],
        num_attention_heads=width // vision.get("head_width", 64),
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        hidden_act="quick_gelu" if model_config.get("quick_gelu") else "gelu",
        projection_dim=embedding_width,
    )
    model = CLIPVisionModel(config)
    model.load_state_dict(convert_open_clip(load_file(folder / _OPEN_CLIP[1])), strict=True)
    return model.eval(), TransformConfig.from_open_clip({**pixels, "size": vision["image_size"]})


def convert_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames an open_clip state dict's picture side to transformers' names, in fp32.

    Raises:
        ValueError: naming the tensors that a plain CLIP ViT does not have.
    """
    made: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        if not name.startswith("visual."):
            continue
        bare = name.removeprefix("visual.")
        value = tensor.float()
        if bare in _TOWER:
            made[_TOWER[bare]] = value
        elif bare.startswith("transformer.resblocks."):
            number, _, part = bare.removeprefix("transformer.resblocks.").partition(".")
            layer, (module, _, kind) = f"encoder.layers.{number}", part.rpartition(".")
            if module in _BLOCK:
                made[f"{layer}.{_BLOCK[module]}.{kind}"] = value
            elif part in ("attn.in_proj_weight", "attn.in_proj_bias"):
                for side, third in zip("qkv", value.chunk(3), strict=True):
                    made[f"{layer}.self_attn.{side}_proj.{part.rpartition('_')[2]}"] = third.clone()
            else:
                unknown.append(name)
        elif bare not in _DROPPED:
            unknown.append(name)
    if unknown:
        raise ValueError(f"a plain CLIP ViT has no {', '.join(unknown[:8])}")
    return made


def count_patches(model: CLIPVisionModel) -> int:
    """Patch tokens of a picture, the class token left out."""
    config: Any = model.config
    return int((config.image_size // config.patch_size) ** 2)
