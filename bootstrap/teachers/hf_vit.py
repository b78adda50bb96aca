"""transformers' ViTs as teachers: CLIP, SigLIP, DINOv2 (also with registers) and ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from sparse_vlm.transform import TransformConfig

from .spec import TeacherError, TeacherSpec, common_eps, name_activation
from .trunk import Trunk

# Class name -> weight table.
LAYOUT_OF_CLASS = {
    "CLIPModel": "hf_clip",
    "CLIPVisionModel": "hf_clip",
    "CLIPVisionModelWithProjection": "hf_clip",
    "SiglipModel": "hf_siglip",
    "SiglipVisionModel": "hf_siglip",
    "Dinov2Model": "hf_dinov2",
    "Dinov2WithRegistersModel": "hf_dinov2",
    "ViTModel": "hf_vit",
    "ViTForImageClassification": "hf_vit",
}


class HfTrunk(Trunk):
    """A transformers ViT.

    Args:
        model: one of :data:`LAYOUT_OF_CLASS`.
        name: how it was asked for.
        transform: image preparation.
        tokenizer_source: folder or hub name of the tokenizer, for CLIP and SigLIP with a text side.

    Raises:
        TeacherError: if it is none of these, or its blocks are not plain ViT blocks, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        transform: TransformConfig,
        tokenizer_source: str | None = None,
    ) -> None:
        super().__init__()
        kind = type(model).__name__
        if kind not in LAYOUT_OF_CLASS:
            known = ", ".join(LAYOUT_OF_CLASS)
            raise TeacherError(f"{name}: {kind} is none of transformers' plain ViTs ({known})")
        self.layout = LAYOUT_OF_CLASS[kind]
        self.model: Any = model
        self._tokenizer_source = tokenizer_source
        self._tokenizer: Any = None
        self.spec = _describe(self, name, transform)
        config = _vision_config(model)
        self._resized = self.spec.image_size != _pair(config.image_size)

    @property
    def vision(self) -> Any:
        """The image tower: the model itself, or its part."""
        part = "vit" if self.layout == "hf_vit" else "vision_model"
        return getattr(self.model, part, self.model)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, wherever this release of transformers keeps them."""
        if self.layout in ("hf_clip", "hf_siglip"):
            return self.vision.encoder.layers
        return self.vision.layers if hasattr(self.vision, "layers") else self.vision.encoder.layer

    @property
    def projection(self) -> nn.Linear | None:
        """From the pooled vector to the output space."""
        part = {"hf_clip": "visual_projection", "hf_vit": "classifier"}.get(self.layout, "")
        layer = getattr(self.model, part, None) if part else None
        return layer if isinstance(layer, nn.Linear) else None

    def embed(self, images: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        embeddings = self.vision.embeddings
        if self.layout == "hf_dinov2":
            return embeddings(images)  # these always fit their positions to the picture
        tokens = embeddings(images, interpolate_pos_encoding=self._resized)
        return self.vision.pre_layrnorm(tokens) if self.layout == "hf_clip" else tokens

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        result = self.blocks[index](tokens, None)
        return result[0] if isinstance(result, tuple) else result

    def finish(self, tokens: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        normed = _last_norm(self)(tokens)
        pooled = self.vision.head(normed[:, num_prefix:]) if self.layout == "hf_siglip" else normed[:, 0]
        projection = self.projection
        return normed, pooled if projection is None else projection(pooled)

    def vision_state_dict(self) -> dict[str, Tensor]:
        """See :class:`Trunk`."""
        text = ("text_model.", "text_projection.")
        return {key: value for key, value in self.model.state_dict().items() if not key.startswith(text)}

    @property
    def has_text(self) -> bool:
        """See :class:`Trunk`."""
        return self._tokenizer_source is not None and hasattr(self.model, "get_text_features")

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """See :class:`Trunk`."""
        if not hasattr(self.model, "get_text_features"):
            return super().encode_text(texts)
        if self._tokenizer_source is None:
            raise TeacherError(f"{self.spec.name} has a text side but no tokenizer files beside its weights")
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_source)
        tokens = self._tokenizer(
            list(texts),
            # SigLIP was trained on padded texts only and pools from the last place.
            padding="max_length" if self.layout == "hf_siglip" else True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(next(self.model.parameters()).device)
        if self.layout == "hf_siglip":
            # Nor was its padding masked: published tokenizers make no mask, transformers' own classes do.
            tokens.pop("attention_mask", None)
        features = self.model.get_text_features(**tokens)
        return features if isinstance(features, Tensor) else features.pooler_output

    @property
    def logit_scale(self) -> float | None:
        """See :class:`Trunk`."""
        scale = getattr(self.model, "logit_scale", None)
        return None if scale is None else float(scale.detach().exp())


def _describe(trunk: HfTrunk, name: str, transform: TransformConfig) -> TeacherSpec:
    config = _vision_config(trunk.model)
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "use_swiglu_ffn", False):
        raise TeacherError(f"{name}: its MLPs are SwiGLU (gated), not two linear layers")
    if getattr(config, "head_dim", None) not in (None, width // heads):
        raise TeacherError(f"{name}: its attention heads are not width / heads wide")
    if trunk.layout == "hf_siglip" and not hasattr(trunk.vision, "head"):
        raise TeacherError(f"{name}: it has no pooling head (vision_use_head=false)")
    norms: dict[str, nn.Module] = {"last norm": _last_norm(trunk)}
    parts: list[tuple[str, nn.Module]] = [(f"block {i}", block) for i, block in enumerate(trunk.blocks)]
    if trunk.layout == "hf_clip":
        parts.append(("pre_layrnorm", trunk.vision.pre_layrnorm))
    if trunk.layout == "hf_siglip":
        parts.append(("head", trunk.vision.head))
    for where, part in parts:
        found = {f"{where} {key}": module for key, module in part.named_modules()}
        norms |= {key: module for key, module in found.items() if isinstance(module, nn.LayerNorm)}
    mlp_width = getattr(config, "intermediate_size", None)
    if trunk.layout == "hf_dinov2":
        mlp_width = int(width * config.mlp_ratio)
    projection = trunk.projection
    return TeacherSpec(
        name=name,
        library="transformers",
        width=width,
        depth=len(trunk.blocks),
        heads=heads,
        mlp_width=int(mlp_width or 0),
        activation=name_activation(ACT2FN[config.hidden_act], name),
        layer_scale=trunk.layout == "hf_dinov2",
        norm_eps=common_eps(norms, name),
        qkv_bias=bool(getattr(config, "qkv_bias", True)),
        pre_norm=trunk.layout == "hf_clip",
        has_cls=trunk.layout != "hf_siglip",
        num_registers=int(getattr(config, "num_register_tokens", 0)),
        pooling="attention" if trunk.layout == "hf_siglip" else "cls",
        output_width=0 if projection is None else projection.out_features,
        head_bias=projection is not None and projection.bias is not None,
        image_size=(transform.height, transform.width),
        patch_size=_pair(config.patch_size),
        transform=transform,
    )


def _vision_config(model: Any) -> Any:
    return getattr(model.config, "vision_config", model.config)


def _last_norm(trunk: HfTrunk) -> nn.Module:
    return trunk.vision.post_layernorm if trunk.layout in ("hf_clip", "hf_siglip") else trunk.vision.layernorm


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
