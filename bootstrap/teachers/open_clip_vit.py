"""open_clip's image-text models as teachers: CLIP (OpenAI's too), and timm trunks such as SigLIP's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from sparse_vlm.transform import TransformConfig

from .spec import TeacherError, TeacherSpec, common_eps, name_activation
from .timm_vit import describe_timm, finish_timm
from .trunk import Trunk


class _OpenClipTrunk(Trunk):
    """What both kinds of image tower share: the text side and the weights' names."""

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.model: Any = model
        self._tokenizer = tokenizer

    def vision_state_dict(self) -> dict[str, Tensor]:
        """See :class:`Trunk`."""
        return {key: tensor for key, tensor in self.model.state_dict().items() if key.startswith("visual.")}

    @property
    def has_text(self) -> bool:
        """See :class:`Trunk`."""
        return self._tokenizer is not None and hasattr(self.model, "encode_text")

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """See :class:`Trunk`."""
        if self._tokenizer is None or not self.has_text:
            return super().encode_text(texts)
        device = next(self.model.parameters()).device
        return self.model.encode_text(self._tokenizer(list(texts)).to(device))

    @property
    def logit_scale(self) -> float | None:
        """See :class:`Trunk`."""
        scale = getattr(self.model, "logit_scale", None)
        return None if scale is None else float(scale.detach().exp())


class OpenClipTrunk(_OpenClipTrunk):
    """open_clip's own VisionTransformer.

    Args:
        model: the whole image-text model.
        name: how it was asked for.
        tokenizer: texts to token numbers; None leaves the text side unused.
        transform: image preparation; by default the model's own preprocess configuration.

    Raises:
        TeacherError: if its blocks are not plain ViT blocks, with the reason.
    """

    layout = "open_clip_vit"

    def __init__(
        self,
        model: nn.Module,
        name: str,
        tokenizer: Callable[..., Tensor] | None = None,
        transform: TransformConfig | None = None,
    ) -> None:
        super().__init__(model, tokenizer)
        self.spec = _describe(self.model.visual, name, transform)

    def embed(self, images: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        return self.model.visual._embeds(images)

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        return self.model.visual.transformer.resblocks[index](tokens)

    def finish(self, tokens: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        visual = self.model.visual
        normed = visual.ln_post(tokens)
        if visual.pool_type == "tok":
            pooled = normed[:, 0]
        else:
            pooled = visual.ln_post(tokens[:, num_prefix:].mean(dim=1))
        return normed, pooled @ visual.proj


class OpenClipTimmTrunk(_OpenClipTrunk):
    """A timm ViT inside an open_clip model, as in open_clip's SigLIPs.

    Args:
        model: the whole image-text model.
        name: how it was asked for.
        tokenizer: texts to token numbers; None leaves the text side unused.
        transform: image preparation; by default the model's own preprocess configuration.

    Raises:
        TeacherError: if its blocks are not plain ViT blocks, with the reason.
    """

    layout = "open_clip_timm"

    def __init__(
        self,
        model: nn.Module,
        name: str,
        tokenizer: Callable[..., Tensor] | None = None,
        transform: TransformConfig | None = None,
    ) -> None:
        super().__init__(model, tokenizer)
        visual = self.model.visual
        transform = transform or _transform(visual, name)
        spec = describe_timm(visual.trunk, name, transform, library="open_clip")
        extra = dict(visual.head.named_children())
        projection = extra.get("proj")
        if set(extra) - {"drop", "proj"} or not (projection is None or isinstance(projection, nn.Linear)):
            raise TeacherError(f"{name}: its head is {list(extra)}, not one linear projection")
        if projection is not None:
            if spec.output_width:
                raise TeacherError(f"{name}: trunk and head both project, a SparseFormer projects once")
            width, bias = projection.out_features, projection.bias is not None
            spec = TeacherSpec(
                **{**spec.__dict__, "output_width": width, "head_bias": bias, "projects": True}
            )
        self.spec = spec

    def embed(self, images: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        trunk = self.model.visual.trunk
        return trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """See :class:`Trunk`."""
        return self.model.visual.trunk.blocks[index](tokens)

    def finish(self, tokens: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        visual = self.model.visual
        normed, pooled = finish_timm(visual.trunk, tokens, num_prefix)
        return normed, visual.head(visual.trunk.head(pooled))


def build_open_clip_trunk(
    model: nn.Module,
    name: str,
    tokenizer: Callable[..., Tensor] | None = None,
    transform: TransformConfig | None = None,
) -> Trunk:
    """The right trunk for an open_clip model.

    Raises:
        TeacherError: if its image tower is not a plain ViT, with the reason.
    """
    visual = getattr(model, "visual", None)
    if type(visual) is VisionTransformer:
        return OpenClipTrunk(model, name, tokenizer, transform)
    if isinstance(visual, TimmModel):
        return OpenClipTimmTrunk(model, name, tokenizer, transform)
    raise TeacherError(f"{name}: its image tower is a {type(visual).__name__}, not a plain ViT")


def _transform(visual: Any, name: str) -> TransformConfig:
    """The model's own image preparation."""
    preprocess = getattr(visual, "preprocess_cfg", None) or {"size": visual.image_size}
    try:
        return TransformConfig.from_open_clip(preprocess)
    except ValueError as error:
        raise TeacherError(f"{name}: {error}") from None


def _describe(visual: Any, name: str, transform: TransformConfig | None) -> TeacherSpec:
    blocks = visual.transformer.resblocks
    norms: dict[str, nn.Module] = {"ln_post": visual.ln_post}
    for index, block in enumerate(blocks):
        where = f"{name}: block {index}"
        if type(block) is not ResidualAttentionBlock:
            raise TeacherError(
                f"{where} is a {type(block).__name__} (query-key norm, scaled heads or inner norms), "
                "not a plain ViT block"
            )
        if not block.attn._qkv_same_embed_dim or block.attn.bias_k is not None:
            raise TeacherError(f"{where} has an attention of another kind than plain self-attention")
        norms |= {f"block {index} ln_1": block.ln_1, f"block {index} ln_2": block.ln_2}
    pre_norm = not isinstance(visual.ln_pre, nn.Identity)
    if pre_norm:
        norms["ln_pre"] = visual.ln_pre
    if visual.attn_pool is not None:
        raise TeacherError(f"{name}: it pools with CoCa's attention pooler, which no SparseFormer has")
    if visual.pool_type not in ("tok", "avg"):
        raise TeacherError(f"{name}: pool_type={visual.pool_type!r} gives no single embedding")
    if visual.pool_type == "avg" and not visual.final_ln_after_pool:
        raise TeacherError(f"{name}: it averages normed tokens, a SparseFormer's head norms the average")
    if visual.proj is None:
        raise TeacherError(f"{name}: its projection was removed")
    first = blocks[0]
    return TeacherSpec(
        name=name,
        library="open_clip",
        width=first.attn.embed_dim,
        depth=len(blocks),
        heads=first.attn.num_heads,
        mlp_width=first.mlp.c_fc.out_features,
        activation=name_activation(first.mlp.gelu, name),
        layer_scale=not isinstance(first.ls_1, nn.Identity),
        norm_eps=common_eps(norms, name),
        qkv_bias=first.attn.in_proj_bias is not None,
        pre_norm=pre_norm,
        has_cls=True,
        num_registers=0,
        pooling="cls" if visual.pool_type == "tok" else "mean",
        output_width=visual.proj.shape[1],
        head_bias=False,
        image_size=tuple(visual.image_size),
        patch_size=tuple(visual.patch_size),
        transform=transform or _transform(visual, name),
    )
