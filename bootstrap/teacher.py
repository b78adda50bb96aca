"""The teacher: a frozen vision transformer that is only ever looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.config import SparseFormerConfig
from sparse_vlm.encoder import SparseFormer
from sparse_vlm.fingerprint import hash_tensors, hash_tower
from sparse_vlm.inherit import InheritPlan, InheritReport, inherit
from sparse_vlm.packed import pack_linears

from .teachers.activation import fuse_quick_gelu
from .teachers.locate import load_trunk
from .teachers.spec import TeacherError, TeacherOutput, TeacherSpec
from .teachers.trunk import Trunk

__all__ = [
    "Teacher",
    "TeacherError",
    "TeacherOutput",
    "TeacherSpec",
    "check_architecture",
    "hash_teacher",
    "inherit_teacher",
    "load_teacher",
    "spec_to_config",
]


class Teacher(nn.Module):
    """A frozen ViT: always in evaluation mode, no gradients for its weights.

    Args:
        trunk: the library's model behind :class:`Trunk`'s face.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        fuse_quick_gelu(trunk)
        self.requires_grad_(False)
        self.train(False)

    @property
    def spec(self) -> TeacherSpec:
        """The facts about this ViT."""
        return self.trunk.spec

    @property
    def state_dict_layout(self) -> str:
        """The weight table (:mod:`sparse_vlm.inherit_tables`) of :meth:`vision_state_dict`."""
        return self.trunk.layout

    @property
    def has_text(self) -> bool:
        """Whether :meth:`encode_text` works: a CLIP or SigLIP with its tokenizer."""
        return self.trunk.has_text

    @property
    def logit_scale(self) -> float | None:
        """Factor on image-text cosine similarities, where the teacher has a text side."""
        return self.trunk.logit_scale

    def vision_state_dict(self) -> dict[str, Tensor]:
        """The weights of the image side under the library's own names."""
        return self.trunk.vision_state_dict()

    def train(self, mode: bool = True) -> Teacher:
        """Has no effect: a teacher stays in evaluation mode."""
        super().train(False)
        return self

    def to_bf16(self) -> Teacher:
        """Cast to bf16, for asking only; on a CPU its weights also get the order that the kernels read."""
        self.to(dtype=torch.bfloat16)
        if self.device.type == "cpu":
            pack_linears(self)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, at_block: int | None = None, stop: bool = False) -> TeacherOutput:
        """Look at pictures.

        Args:
            images: (B, 3, H, W), prepared as ``spec.transform`` says, of ``spec.image_size``.
            at_block: also return the tokens that enter this block (0 to L; L for those leaving the last).
            stop: compute nothing beyond that block; ``pooled``, ``tokens`` and ``cls`` are then None.

        Raises:
            ValueError: for pictures of another size, or a block that is not there.
        """
        spec = self.spec
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *spec.image_size):
            raise ValueError(
                f"teacher {spec.name} takes pictures of the shape (B, 3, {spec.image_size[0]}, "
                f"{spec.image_size[1]}), got {tuple(images.shape)}: prepare them with its spec.transform"
            )
        if at_block is not None and not 0 <= at_block <= spec.depth:
            raise ValueError(f"teacher {spec.name} has {spec.depth} blocks, no state at block {at_block}")
        if stop and at_block is None:
            raise ValueError("stop=True needs at_block: where to stop")
        tokens = self.trunk.embed(images.to(self.dtype))  # (B, prefix + P, D)
        mid = mid_cls = None
        for index in range(spec.depth + 1):
            if index == at_block:
                mid = tokens[:, spec.num_prefix :]
                mid_cls = tokens[:, 0] if spec.has_cls else None
                if stop:
                    return TeacherOutput(None, None, None, mid, mid_cls, spec.grid)
            if index < spec.depth:
                tokens = self.trunk.run_block(index, tokens)
        normed, pooled = self.trunk.finish(tokens, spec.num_prefix)
        cls = normed[:, 0] if spec.has_cls else None
        return TeacherOutput(pooled, normed[:, spec.num_prefix :], cls, mid, mid_cls, spec.grid)

    def run_from(self, tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Run the last blocks on tokens from elsewhere; gradients flow to the tokens.

        Args:
            tokens: (B, N, D) entering ``block``, class token first where the ViT has one, no registers.
            block: the first block to run, 0 to L.

        Returns:
            Normalised tokens (B, N, D) and the pooled embedding (B, E).

        Raises:
            ValueError: for a block that is not there.
        """
        if not 0 <= block <= self.spec.depth:
            raise ValueError(f"teacher {self.spec.name} has {self.spec.depth} blocks, no block {block}")
        for index in range(block, self.spec.depth):
            tokens = self.trunk.run_block(index, tokens)
        return self.trunk.finish(tokens, int(self.spec.has_cls))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, E) of texts in the space of ``pooled``, not normalised.

        Raises:
            TeacherError: if this teacher has no text side or no tokenizer.
        """
        return self.trunk.encode_text(texts)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.trunk.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.trunk.parameters()).dtype


def load_teacher(
    name: str,
    weights: str | PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """Load a frozen teacher.

    Only names that say so touch the network:

    ==============================  =========================================================
    ``open_clip:MODEL``             an architecture; ``weights`` names a checkpoint file
    ``open_clip:MODEL/TAG``         downloads the pretrained tag
    ``timm:MODEL`` (``MODEL.TAG``)  an architecture; ``weights`` names a checkpoint file
    ``timm:MODEL@pretrained``       downloads the model's default (or ``.TAG``'s) weights
    ``hf:OWNER/NAME``               downloads from the Hugging Face hub
    ``hf:DIR``, ``DIR``, ``FILE``   a local folder in a library's own format, or a safetensors
                                    file whose metadata names its timm model
    ==============================  =========================================================

    Args:
        name: one of these.
        weights: checkpoint file (or a folder with one) for the first and third form.
        device: where to put it.
        dtype: precision to run in.

    Raises:
        TeacherError: with one clear sentence: unknown or ambiguous name, missing or foreign weights, or a
            model whose blocks cannot be inherited.
    """
    return Teacher(load_trunk(name, weights)).to(device=device, dtype=dtype)


def spec_to_config(spec: TeacherSpec, drop: int | None = None, **overrides: Any) -> SparseFormerConfig:
    """The SparseFormer whose cortex and head fit a teacher.

    Args:
        spec: the teacher's.
        drop: first blocks that the focusing transformer replaces; a third by default.
        overrides: fields of :class:`SparseFormerConfig` to set differently.

    Raises:
        ValueError: if the width does not fit a SparseFormer, or an override is unknown or contradictory.
    """
    drop = spec.depth // 3 if drop is None else drop
    if not 0 <= drop < spec.depth:
        raise ValueError(f"drop must be 0 to {spec.depth - 1} of {spec.depth} blocks, got {drop}")
    focusing_width = overrides.get("focusing_width", max(64, int(spec.width / 128 + 0.5) * 64))
    # Of another type it is refused below, with its name.
    derived = focusing_width if type(focusing_width) is int else 64
    values = {
        "width": spec.width,
        "depth": spec.depth - drop,
        "heads": spec.heads,
        "mlp_width": spec.mlp_width,
        "activation": spec.activation,
        "layer_scale": spec.layer_scale,
        "norm_eps": spec.norm_eps,
        "qkv_bias": spec.qkv_bias,
        "pooling": spec.pooling,
        "cls_token": spec.has_cls,
        "output_width": spec.output_width,
        "head_bias": spec.head_bias,
        "entry_norm": spec.pre_norm and drop == 0,
        "num_latents": 48 if spec.has_cls else 49,
        "focusing_width": focusing_width,
        "focusing_heads": max(1, derived // 64),
        "focusing_mlp_width": 4 * derived,
    }
    source = f"student.architecture, on top of teacher {spec.name}" if overrides else f"teacher {spec.name}"
    return SparseFormerConfig.from_dict({**values, **overrides}, source=source)


def hash_teacher(weights: Mapping[str, Tensor]) -> str:
    """What a run and its stored targets know a teacher by: its tower's hash, with its projection's where the
    tower's leaves that out.

    Args:
        weights: of its picture side, see :meth:`Teacher.vision_state_dict`.
    """
    tower = hash_tower(weights)
    projection = {name: tensor for name, tensor in weights.items() if name.startswith("visual_projection.")}
    return f"{tower}+{hash_tensors(projection)}" if projection else tower


_OF_THE_TEACHER = (
    *("width", "depth", "heads", "mlp_width"),
    *("activation", "layer_scale", "norm_eps", "qkv_bias"),
)


def check_architecture(
    config: SparseFormerConfig, spec: TeacherSpec, drop: int, source: str, pooled: bool = True
) -> None:
    """See that the cortex is a teacher's, and that the embeddings can be compared.

    Args:
        config: the student's architecture.
        spec: the teacher's.
        drop: first blocks that the focusing transformer replaces.
        source: where the architecture comes from, for the error.
        pooled: whether embeddings are compared.

    Raises:
        ValueError: naming what differs.
    """
    wanted = spec_to_config(spec, drop)
    pairs = {name: (getattr(config, name), getattr(wanted, name)) for name in _OF_THE_TEACHER}
    wrong = [
        f"{name} is {ours!r}, not {theirs!r}" for name, (ours, theirs) in pairs.items() if ours != theirs
    ]
    embedding = config.output_width or config.width
    if pooled and embedding != spec.embedding_width:
        wrong.append(f"the embedding has width {embedding}, not {spec.embedding_width}")
    if wrong:
        raise ValueError(f"{source} does not fit the teacher {spec.name}: {', '.join(wrong)}")


def inherit_teacher(
    encoder: SparseFormer, teacher: Teacher, plan: InheritPlan, cls_state: Tensor | None = None
) -> InheritReport:
    """Give an encoder the teacher's blocks and head, and freeze what the plan freezes.

    Args:
        encoder: built from :func:`spec_to_config` of this teacher with the plan's ``drop``.
        teacher: whose weights.
        plan: which blocks are dropped, tuned and frozen.
        cls_state: what the class token starts from, see :func:`bootstrap.targets.measure_spreads`.

    Raises:
        InheritanceError: if they do not fit, with the reason.
    """
    spec = teacher.spec
    return inherit(
        encoder,
        teacher.vision_state_dict(),
        teacher.state_dict_layout,
        plan,
        activation=spec.activation,
        heads=spec.heads,
        norm_eps=spec.norm_eps,
        cls_state=cls_state,
        patches=spec.grid[0] * spec.grid[1],
    )
