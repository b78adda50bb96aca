"""timm's VisionTransformer as a teacher: AugReg, CLIP, SigLIP, DINOv2 and their kin."""

from __future__ import annotations

from typing import Any

from timm.data import resolve_data_config
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sparse_vlm.transform import TransformConfig

from .spec import TeacherError, TeacherSpec, common_eps, name_activation
from .trunk import Trunk

_POOLING = {"token": "cls", "avg": "mean", "map": "attention"}


class TimmTrunk(Trunk):
    """A timm ViT.

    Args:
        model: the model, with its classifier where it has one.
        name: how it was asked for.
        transform: image preparation; by default the model's own pretrained configuration.

    Raises:
        TeacherError: if its blocks are not plain ViT blocks, with the reason.
    """

    layout = "timm_vit"

    def __init__(self, model: nn.Module, name: str, transform: TransformConfig | None = None) -> None:
        super().__init__()
        self.spec = describe_timm(model, name, transform)
        self.model: Any = model

    def embed(self, images: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(tokens)

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        return self.model.blocks[index](tokens)

    def finish(self, tokens: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        normed, pooled = finish_timm(self.model, tokens, num_prefix)
        return normed, self.model.head(pooled)

    def vision_state_dict(self) -> dict[str, Tensor]:
        """See :class:`Trunk`."""
        return self.model.state_dict()


def finish_timm(model: Any, tokens: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Normalised tokens (B, N, D) and the vector before the classifier (B, D) of a timm ViT."""
    if model.global_pool == "avg":
        # timm norms the mean here, not the tokens; the tokens get the same norm for their own use.
        return model.fc_norm(tokens), model.fc_norm(tokens[:, num_prefix:].mean(dim=1))
    normed = model.norm(tokens)
    if model.global_pool == "map":
        return normed, model.attn_pool(normed[:, num_prefix:])
    return normed, model.fc_norm(normed[:, 0])


def describe_timm(
    model: nn.Module, name: str, transform: TransformConfig | None = None, library: str = "timm"
) -> TeacherSpec:
    """The facts about a timm ViT.

    Raises:
        TeacherError: if a SparseFormer's cortex cannot inherit its blocks, with the reason.
    """
    if type(model) is not VisionTransformer:
        raise TeacherError(f"{name}: {_why_not_plain(model)}")
    vit: Any = model
    for index, block in enumerate(vit.blocks):
        _check_block(block, f"{name}: block {index}")
    projection = vit.patch_embed
    if not isinstance(getattr(projection, "proj", None), nn.Conv2d) or hasattr(projection, "backbone"):
        raise TeacherError(
            f"{name}: its patch embedding is a {type(projection).__name__} (a hybrid), not one convolution"
        )
    _check_pooling(vit, name)
    first = vit.blocks[0]
    last_norm = vit.fc_norm if vit.global_pool == "avg" else vit.norm
    norms: dict[str, nn.Module] = {"last norm": last_norm}
    for index, block in enumerate(vit.blocks):
        norms |= {f"block {index} norm1": block.norm1, f"block {index} norm2": block.norm2}
    if not isinstance(vit.norm_pre, nn.Identity):
        norms["norm_pre"] = vit.norm_pre
    if vit.attn_pool is not None:
        norms["attn_pool.norm"] = vit.attn_pool.norm
    if transform is None:
        try:
            # The size is the model's own, which its pretrained configuration may contradict.
            size = {"input_size": (3, *projection.img_size)}
            transform = TransformConfig.from_timm(resolve_data_config(size, model=model))
        except ValueError as error:
            raise TeacherError(f"{name}: {error}") from None
    has_head = isinstance(vit.head, nn.Linear)
    return TeacherSpec(
        name=name,
        library="timm" if library == "timm" else "open_clip",
        width=vit.embed_dim,
        depth=len(vit.blocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.fc1.out_features,
        activation=name_activation(first.mlp.act, name),
        layer_scale=not isinstance(first.ls1, nn.Identity),
        norm_eps=common_eps(norms, name),
        qkv_bias=first.attn.qkv.bias is not None,
        pre_norm="norm_pre" in norms,
        has_cls=vit.cls_token is not None,
        num_registers=0 if vit.reg_token is None else vit.reg_token.shape[1],
        pooling=_POOLING[vit.global_pool],
        output_width=vit.head.out_features if has_head else 0,
        head_bias=has_head and vit.head.bias is not None,
        image_size=tuple(projection.img_size),
        patch_size=tuple(projection.patch_size),
        transform=transform,
        # timm has CLIP's projections as heads with a bias of zeros.
        projects=has_head
        and "_clip_" in str((getattr(vit, "pretrained_cfg", None) or {}).get("architecture"))
        and (vit.head.bias is None or not vit.head.bias.count_nonzero()),
    )


def _check_block(block: Any, where: str) -> None:
    block_class = type(block)
    if block_class is not Block:
        reasons = {
            "ResPostBlock": "norms its branches at their end",
            "ParallelScalingBlock": "runs attention and MLP in parallel",
            "ParallelThingsBlock": "runs several attentions and MLPs in parallel",
        }
        kind = block_class.__name__
        raise TeacherError(f"{where} is a {kind}, which {reasons.get(kind, 'is no plain pre-norm block')}")
    attention, mlp = block.attn, block.mlp
    if type(attention).__name__ != "Attention":
        kind = type(attention).__name__
        raise TeacherError(f"{where} has {kind} (rotary or relative positions), not plain attention")
    for part in ("q_norm", "k_norm"):
        if not isinstance(getattr(attention, part, nn.Identity()), nn.Identity):
            raise TeacherError(f"{where} normalises queries and keys, which the cortex does not")
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        raise TeacherError(f"{where} normalises its attention's output, which the cortex does not")
    if getattr(attention, "gate", None) is not None:
        raise TeacherError(f"{where} gates its attention, which the cortex does not")
    if attention.qkv.out_features != 3 * attention.qkv.in_features or attention.proj.bias is None:
        raise TeacherError(f"{where}: its attention is not as wide as its tokens, or has no output bias")
    layers = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    plain = all(isinstance(layer, nn.Linear) and layer.bias is not None for layer in layers)
    if not plain or layers[0].out_features != layers[1].in_features:  # type: ignore[union-attr]
        raise TeacherError(f"{where} has a {type(mlp).__name__} (gated MLP), not two linear layers with bias")
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        raise TeacherError(f"{where} normalises inside its MLP, which the cortex does not")


def _check_pooling(vit: Any, name: str) -> None:
    if vit.global_pool not in _POOLING:
        known = ", ".join(map(repr, _POOLING))
        raise TeacherError(f"{name}: global_pool={vit.global_pool!r} is none of {known}")
    normed_tokens = not isinstance(vit.norm, nn.Identity)
    normed_vector = not isinstance(vit.fc_norm, nn.Identity)
    if normed_tokens and normed_vector:
        raise TeacherError(f"{name}: it norms tokens and pooled vector, a SparseFormer's head norms once")
    if vit.global_pool == "avg":
        if not normed_vector:
            raise TeacherError(f"{name}: it averages normed tokens, a SparseFormer's head norms the average")
        if vit.pool_include_prefix:
            raise TeacherError(f"{name}: it averages class token and patches together")
    elif not normed_tokens:
        raise TeacherError(f"{name}: it has no norm after its last block")
    pool = vit.attn_pool
    if pool is None:
        return
    plain = type(pool).__name__ == "AttentionPoolLatent" and isinstance(pool.q_norm, nn.Identity)
    if not plain or pool.latent_len != 1 or pool.pos_embed is not None or pool.mlp is None:
        raise TeacherError(f"{name}: its attention pooling is not SigLIP's")
    first = vit.blocks[0]
    same_heads = pool.num_heads == first.attn.num_heads
    if not same_heads or pool.mlp.fc1.out_features != first.mlp.fc1.out_features:
        raise TeacherError(f"{name}: its attention pooling has other heads or MLP width than its blocks")
    if vit.pool_include_prefix and vit.num_prefix_tokens:
        raise TeacherError(f"{name}: its attention pooling reads class token and registers too")


def _why_not_plain(model: nn.Module) -> str:
    kind = type(model).__name__
    parts = {type(module).__name__.lower() for module in model.modules()}
    if any("rotary" in part or "rope" in part for part in parts):
        return f"{kind} uses rotary position embeddings in its attention, the cortex does not"
    if isinstance(model, VisionTransformer):
        return f"{kind} adds to timm's plain VisionTransformer (a distillation token, say)"
    return f"{kind} is not a plain ViT (timm's VisionTransformer): its blocks cannot run on 49 free tokens"
