"""Where each library keeps the weights of a vision transformer: one readable table per key style.

Every table maps a *canonical* name, timm's where timm has one, to the name (or names) in a library's state
dict. Nothing is matched by pattern: what a table does not name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stacked:
    """Several source tensors, stacked along their first dimension (separate q, k, v made one)."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Transposed:
    """A source matrix that its library multiplies from the other side."""

    key: str


@dataclass(frozen=True)
class Thirds:
    """The thirds ``first`` to ``last`` (exclusive) of a packed q, k, v tensor's rows."""

    key: str
    first: int
    last: int


@dataclass(frozen=True)
class Token:
    """A single token vector of any leading shape, stored here as (1, 1, D)."""

    key: str


Source = str | Stacked | Transposed | Thirds | Token


@dataclass(frozen=True)
class KeyStyle:
    """One way of naming the tensors of a ViT.

    Attributes:
        name: the style in words, for messages.
        root: prefix of the vision tower where the state dict holds more than it (``"visual."``).
        blocks: prefix of one block, with ``{i}`` for its index.
        block: canonical name inside a block -> source name inside a block.
        tower: canonical name -> source name, for everything outside the blocks.
        optional: canonical names (of a block or the tower) that a ViT may do without.
        position: source name of the position embeddings.
        left_behind: source names of tensors that a SparseFormer has no place for -> why.
        beside: names that stand beside ``root``, not below it, yet belong to the image side.
        elsewhere: prefixes of tensors beside ``root`` that belong to the other side -> why they stay.
    """

    name: str
    root: str
    blocks: str
    block: Mapping[str, Source]
    tower: Mapping[str, Source]
    optional: frozenset[str]
    position: str
    left_behind: Mapping[str, str]
    beside: frozenset[str] = frozenset()
    elsewhere: Mapping[str, str] = field(default_factory=dict)


PATCH_EMBEDDING = "patch embedding: a SparseFormer samples points instead"
POSITIONS = "position embeddings: a SparseFormer's tokens carry their RoI instead"
REGISTERS = "register tokens: the cortex runs without them"
MASK_TOKEN = "mask token: of use in pre-training only"
TEXT_SIDE = "text side"
TEMPERATURE = "temperature of the contrastive loss"
POOLER = "transformers' tanh pooler: the pooled embedding is the normed class token"


def _pairs(*names: tuple[str, str]) -> dict[str, Source]:
    """Tables for layers with a weight and a bias each."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in names for part in ("weight", "bias")}


_COMMON_OPTIONAL = frozenset(
    {"attn.qkv.bias", "ls1.gamma", "ls2.gamma", "cls_token", "entry_norm.weight", "entry_norm.bias"}
    | {"proj.weight", "proj.bias"}
)
_POOL_NAMES = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
_POOL_OPTIONAL = frozenset(
    {"pool.probe"} | {f"pool.{name}.{part}" for name in _POOL_NAMES for part in ("weight", "bias")}
)

# timm ------------------------------------------------------------------------------------------------

_TIMM_BLOCK: dict[str, Source] = {
    **_pairs(("norm1", "norm1"), ("attn.qkv", "attn.qkv"), ("attn.proj", "attn.proj")),
    **_pairs(("norm2", "norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")),
    "ls1.gamma": "ls1.gamma",
    "ls2.gamma": "ls2.gamma",
}
_TIMM_POOL: dict[str, Source] = {
    "pool.probe": Token("attn_pool.latent"),
    **_pairs(*((f"pool.{name}", f"attn_pool.{name}") for name in _POOL_NAMES)),
}
_TIMM_TOWER: dict[str, Source] = {
    "cls_token": Token("cls_token"),
    **_pairs(("entry_norm", "norm_pre"), ("norm", "norm"), ("proj", "head")),
    **_TIMM_POOL,
}
_TIMM_LEFT = {
    "patch_embed.proj.weight": PATCH_EMBEDDING,
    "patch_embed.proj.bias": PATCH_EMBEDDING,
    "pos_embed": POSITIONS,
    "reg_token": REGISTERS,
}


def _below(prefix: str, table: Mapping[str, Source]) -> dict[str, Source]:
    """A table whose source names lie one level deeper."""

    def move(source: Source) -> Source:
        if isinstance(source, str):
            return prefix + source
        if isinstance(source, Token):
            return Token(prefix + source.key)
        raise TypeError(f"no rule to move {source!r}")

    return {ours: move(theirs) for ours, theirs in table.items()}


_TIMM = KeyStyle(
    name="timm VisionTransformer",
    root="",
    blocks="blocks.{i}.",
    block=_TIMM_BLOCK,
    tower=_TIMM_TOWER,
    optional=_COMMON_OPTIONAL | _POOL_OPTIONAL,
    position="pos_embed",
    left_behind=_TIMM_LEFT,
)
# With average pooling timm names its last norm after its place, behind the mean.
_TIMM_FC_NORM = KeyStyle(
    name="timm VisionTransformer with fc_norm",
    root="",
    blocks="blocks.{i}.",
    block=_TIMM_BLOCK,
    tower={**_TIMM_TOWER, **_pairs(("norm", "fc_norm"))},
    optional=_COMMON_OPTIONAL | _POOL_OPTIONAL,
    position="pos_embed",
    left_behind=_TIMM_LEFT,
)

# open_clip -------------------------------------------------------------------------------------------

_OPEN_CLIP_ELSEWHERE = {
    "transformer.": TEXT_SIDE,
    "token_embedding.": TEXT_SIDE,
    "positional_embedding": TEXT_SIDE,
    "ln_final.": TEXT_SIDE,
    "text_projection": TEXT_SIDE,
    "attn_mask": TEXT_SIDE,
    "text.": TEXT_SIDE,
    "text_decoder.": TEXT_SIDE,
    "logit_scale": TEMPERATURE,
    "logit_bias": TEMPERATURE,
}
_OPEN_CLIP = KeyStyle(
    name="open_clip VisionTransformer",
    root="visual.",
    blocks="transformer.resblocks.{i}.",
    block={
        **_pairs(("norm1", "ln_1"), ("attn.proj", "attn.out_proj"), ("norm2", "ln_2")),
        "attn.qkv.weight": "attn.in_proj_weight",
        "attn.qkv.bias": "attn.in_proj_bias",
        **_pairs(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
        "ls1.gamma": "ls_1.gamma",
        "ls2.gamma": "ls_2.gamma",
    },
    tower={
        "cls_token": Token("class_embedding"),
        **_pairs(("entry_norm", "ln_pre"), ("norm", "ln_post")),
        "proj.weight": Transposed("proj"),
    },
    optional=_COMMON_OPTIONAL,
    position="positional_embedding",
    left_behind={"conv1.weight": PATCH_EMBEDDING, "positional_embedding": POSITIONS},
    elsewhere=_OPEN_CLIP_ELSEWHERE,
)
_OPEN_CLIP_TIMM = KeyStyle(
    name="open_clip around a timm trunk",
    root="visual.",
    blocks="trunk.blocks.{i}.",
    block=_TIMM_BLOCK,
    tower={**_below("trunk.", _TIMM_TOWER), **_pairs(("proj", "head.proj"))},
    optional=_COMMON_OPTIONAL | _POOL_OPTIONAL,
    position="trunk.pos_embed",
    left_behind={f"trunk.{key}": why for key, why in _TIMM_LEFT.items()},
    elsewhere=_OPEN_CLIP_ELSEWHERE,
)

# transformers ----------------------------------------------------------------------------------------


def _qkv(query: str, key: str, value: str) -> dict[str, Source]:
    """The packed projection out of three separate ones."""
    return {
        f"attn.qkv.{part}": Stacked((f"{query}.{part}", f"{key}.{part}", f"{value}.{part}"))
        for part in ("weight", "bias")
    }


_HF_CLIP_BLOCK: dict[str, Source] = {
    **_qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    **_pairs(("attn.proj", "self_attn.out_proj"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2")),
    **_pairs(("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")),
}
_HF_ELSEWHERE = {
    "text_model.": TEXT_SIDE,
    "text_projection.": TEXT_SIDE,
    "logit_scale": TEMPERATURE,
    "logit_bias": TEMPERATURE,
}
_HF_CLIP = KeyStyle(
    name="transformers CLIP",
    root="vision_model.",
    blocks="encoder.layers.{i}.",
    block=_HF_CLIP_BLOCK,
    tower={
        "cls_token": Token("embeddings.class_embedding"),
        # The misspelling is transformers' own, in every published file.
        **_pairs(("entry_norm", "pre_layrnorm"), ("norm", "post_layernorm")),
        "proj.weight": "visual_projection.weight",
    },
    optional=_COMMON_OPTIONAL,
    position="embeddings.position_embedding.weight",
    left_behind={
        "embeddings.patch_embedding.weight": PATCH_EMBEDDING,
        "embeddings.position_embedding.weight": POSITIONS,
        "embeddings.position_ids": POSITIONS,
    },
    beside=frozenset({"visual_projection.weight"}),
    elsewhere=_HF_ELSEWHERE,
)
_HF_SIGLIP = KeyStyle(
    name="transformers SigLIP",
    root="vision_model.",
    blocks="encoder.layers.{i}.",
    block=_HF_CLIP_BLOCK,
    tower={
        **_pairs(("norm", "post_layernorm"), ("pool.proj", "head.attention.out_proj")),
        "pool.probe": Token("head.probe"),
        "pool.q.weight": Thirds("head.attention.in_proj_weight", 0, 1),
        "pool.q.bias": Thirds("head.attention.in_proj_bias", 0, 1),
        "pool.kv.weight": Thirds("head.attention.in_proj_weight", 1, 3),
        "pool.kv.bias": Thirds("head.attention.in_proj_bias", 1, 3),
        **_pairs(("pool.norm", "head.layernorm")),
        **_pairs(("pool.mlp.fc1", "head.mlp.fc1"), ("pool.mlp.fc2", "head.mlp.fc2")),
    },
    optional=frozenset({"attn.qkv.bias"}),
    position="embeddings.position_embedding.weight",
    left_behind={
        "embeddings.patch_embedding.weight": PATCH_EMBEDDING,
        "embeddings.patch_embedding.bias": PATCH_EMBEDDING,
        "embeddings.position_embedding.weight": POSITIONS,
        "embeddings.position_ids": POSITIONS,
    },
    elsewhere=_HF_ELSEWHERE,
)
_HF_EMBEDDINGS_LEFT = {
    "embeddings.patch_embeddings.projection.weight": PATCH_EMBEDDING,
    "embeddings.patch_embeddings.projection.bias": PATCH_EMBEDDING,
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.mask_token": MASK_TOKEN,
    "embeddings.register_tokens": REGISTERS,
    "pooler.dense.weight": POOLER,
    "pooler.dense.bias": POOLER,
}
_HF_ATTENTION_FILES: dict[str, Source] = {
    **_qkv("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    **_pairs(("attn.proj", "attention.output.dense")),
}
_HF_ATTENTION_MEMORY: dict[str, Source] = {
    **_qkv("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    **_pairs(("attn.proj", "attention.o_proj")),
}
_HF_DINOV2_REST: dict[str, Source] = {
    **_pairs(("norm1", "norm1"), ("norm2", "norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")),
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_HF_VIT_TOWER: dict[str, Source] = {
    "cls_token": Token("embeddings.cls_token"),
    **_pairs(("norm", "layernorm"), ("proj", "classifier")),
}
_CLASSIFIER = frozenset({"classifier.weight", "classifier.bias"})


def _hf_dinov2(words: str, root: str, attention: Mapping[str, Source]) -> KeyStyle:
    return KeyStyle(
        name=f"transformers DINOv2 ({words})",
        root=root,
        blocks="encoder.layer.{i}.",
        block={**attention, **_HF_DINOV2_REST},
        tower={"cls_token": Token("embeddings.cls_token"), **_pairs(("norm", "layernorm"))},
        optional=_COMMON_OPTIONAL,
        position="embeddings.position_embeddings",
        left_behind=_HF_EMBEDDINGS_LEFT,
        elsewhere={
            "classifier.": "classifier over class token and mean patch together: not a SparseFormer head"
        },
    )


def _hf_vit(words: str, blocks: str, block: Mapping[str, Source]) -> KeyStyle:
    return KeyStyle(
        name=f"transformers ViT ({words})",
        root="vit.",
        blocks=blocks,
        block={**block, **_pairs(("norm1", "layernorm_before"), ("norm2", "layernorm_after"))},
        tower=_HF_VIT_TOWER,
        optional=_COMMON_OPTIONAL,
        position="embeddings.position_embeddings",
        left_behind=_HF_EMBEDDINGS_LEFT,
        beside=_CLASSIFIER,
    )


_HF_VIT_FILES = _pairs(("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"))
_HF_VIT_MEMORY = _pairs(("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))

LAYOUTS: dict[str, tuple[KeyStyle, ...]] = {
    "timm_vit": (_TIMM, _TIMM_FC_NORM),
    "open_clip_vit": (_OPEN_CLIP,),
    "open_clip_timm": (_OPEN_CLIP_TIMM,),
    "hf_clip": (_HF_CLIP,),
    "hf_siglip": (_HF_SIGLIP,),
    # transformers renamed these modules; published files keep the first style, newer releases hold the
    # second in memory.
    "hf_dinov2": (
        _hf_dinov2("as in published files", "dinov2.", _HF_ATTENTION_FILES),
        _hf_dinov2("as in memory", "dinov2.", _HF_ATTENTION_MEMORY),
        _hf_dinov2("with registers, as in published files", "dinov2_with_registers.", _HF_ATTENTION_FILES),
        _hf_dinov2("with registers, as in memory", "dinov2_with_registers.", _HF_ATTENTION_MEMORY),
    ),
    "hf_vit": (
        _hf_vit("as in published files", "encoder.layer.{i}.", {**_HF_ATTENTION_FILES, **_HF_VIT_FILES}),
        _hf_vit("as in memory", "layers.{i}.", {**_HF_ATTENTION_MEMORY, **_HF_VIT_MEMORY}),
    ),
}
"""Layout name -> the key styles it is met in."""


def source_keys(source: Source) -> tuple[str, ...]:
    """The state-dict names an entry of a table reads."""
    if isinstance(source, str):
        return (source,)
    return source.keys if isinstance(source, Stacked) else (source.key,)


def read_source(source: Source, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor an entry of a table describes, taken out of ``tensors``."""
    if isinstance(source, str):
        return tensors[source]
    if isinstance(source, Stacked):
        return torch.cat([tensors[key] for key in source.keys])  # (3D, ...)
    if isinstance(source, Transposed):
        return tensors[source.key].t().contiguous()  # (E, D)
    if isinstance(source, Thirds):
        packed = tensors[source.key]
        third = packed.shape[0] // 3
        return packed[source.first * third : source.last * third].clone()  # (D or 2D, ...)
    return tensors[source.key].reshape(1, 1, -1)  # (1, 1, D)
