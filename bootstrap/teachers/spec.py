"""What a teacher is, in numbers and words, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparse_vlm.activations import ACTIVATIONS
from sparse_vlm.inherit import InheritanceError
from sparse_vlm.transform import TransformConfig

Library = Literal["open_clip", "timm", "transformers"]


class TeacherError(InheritanceError):
    """A teacher that cannot be loaded, or whose blocks a SparseFormer cannot inherit, with the reason."""


@dataclass(frozen=True)
class TeacherSpec:
    """The facts about a ViT that its state dict does not tell, and those that decide the student's shape.

    Attributes:
        name: how the teacher was asked for.
        library: whose model it is.
        width: token width D.
        depth: blocks L.
        heads: attention heads K.
        mlp_width: hidden width of the MLPs.
        activation: of the MLPs: ``"gelu"``, ``"quick_gelu"`` or ``"gelu_tanh"``.
        layer_scale: learned residual scales (DINOv2).
        norm_eps: epsilon of every layer norm.
        qkv_bias: bias on query, key and value.
        pre_norm: a layer norm before the first block (CLIP).
        has_cls: a class token comes first.
        num_registers: register tokens after it; they stay inside the teacher.
        pooling: ``"cls"``, ``"mean"`` or ``"attention"``.
        output_width: width E after projection; 0 without one.
        head_bias: bias on the projection.
        image_size: height and width of the input in pixels.
        patch_size: height and width of a patch in pixels.
        transform: how pictures are prepared for it.
        projects: the output is an embedding, though its projection has a bias as classifiers have.
    """

    name: str
    library: Library
    width: int
    depth: int
    heads: int
    mlp_width: int
    activation: str
    layer_scale: bool
    norm_eps: float
    qkv_bias: bool
    pre_norm: bool
    has_cls: bool
    num_registers: int
    pooling: str
    output_width: int
    head_bias: bool
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    transform: TransformConfig
    projects: bool = False

    @property
    def names_classes(self) -> bool:
        """Whether the output is a row of logits."""
        return self.output_width > 0 and self.head_bias and not self.projects

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.has_cls) + self.num_registers

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def embedding_width(self) -> int:
        """Width E of the pooled embedding."""
        return self.output_width or self.width


class TeacherOutput(NamedTuple):
    """What a teacher says about a batch of pictures. P = h * w patches, row by row.

    Attributes:
        pooled: (B, E), the library's own output; None where the teacher stopped early.
        tokens: (B, P, D) final patch tokens after the last layer norm; None where it stopped early.
        cls: (B, D) class token after the last layer norm, or None.
        mid: (B, P, D) patch tokens entering the block that was asked for, not normalised, or None.
        mid_cls: (B, D) class token there, or None.
        grid: (h, w).
    """

    pooled: Tensor | None
    tokens: Tensor | None
    cls: Tensor | None
    mid: Tensor | None
    mid_cls: Tensor | None
    grid: tuple[int, int]


def name_activation(function: Callable[[Tensor], Tensor], where: str) -> str:
    """Which of the encoder's activations a module computes, found by trying it.

    Args:
        function: an activation of any library.
        where: what it belongs to, for the message.

    Raises:
        TeacherError: if it is none of them.
    """
    x = torch.linspace(-4, 4, 161)
    try:
        y = function(x)
    except Exception:
        y = None
    for name, ours in ACTIVATIONS.items():
        if y is not None and y.shape == x.shape and torch.allclose(y, ours(x), rtol=0, atol=1e-6):
            return name
    known = ", ".join(ACTIVATIONS)
    raise TeacherError(f"{where}: activation {function!r} is none of {known}, which the cortex knows")


def common_eps(modules: dict[str, nn.Module], where: str) -> float:
    """The epsilon that all layer norms share.

    Raises:
        TeacherError: if one is no affine layer norm, or they differ.
    """
    values = {}
    for name, module in modules.items():
        if not isinstance(module, nn.LayerNorm) or module.weight is None or module.bias is None:
            raise TeacherError(
                f"{where}: {name} is a {type(module).__name__}, not a layer norm with weight and bias"
            )
        values[name] = float(module.eps)
    if len(set(values.values())) > 1:
        raise TeacherError(f"{where}: its layer norms have different epsilons ({values}), the cortex has one")
    return next(iter(values.values()))
