"""The architecture of a SparseFormer, as one validated frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Operation = Literal["sample", "position", "attention", "mlp", "adjust"]
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
Pooling = Literal["cls", "mean", "attention"]
TokenEmbedding = Literal["shared", "per_token"]
InitialRois = Literal["half", "tiles"]
SamplingPadding = Literal["border", "zeros"]

_WORDS: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "pooling": get_args(Pooling),
    "token_embedding": get_args(TokenEmbedding),
    "initial_rois": get_args(InitialRois),
    "sampling_padding": get_args(SamplingPadding),
}
_OPERATIONS: tuple[str, ...] = get_args(Operation)


@dataclass(frozen=True)
class SparseFormerConfig:
    """Everything that decides the shape and arithmetic of a SparseFormer.

    The defaults are the bootstrapped base model of *Bootstrapping SparseFormers from Vision Foundation
    Models* (CVPR 2024, arXiv 2312.01987) with an AugReg ViT-B/16 cortex. Neither the picture size nor the
    token count of a call is part of the architecture; ``num_latents`` is what a call gets when it does not
    say otherwise.

    Attributes:
        stem_channels: channels C of the feature map that tokens sample from.
        num_latents: latent tokens, each with a region of interest (RoI), when a call does not name a count.
        cls_token: whether a class token without RoI joins the latents where the cortex begins.
        token_embedding: ``"shared"``: all latents start as one vector and differ by their RoI only, so the
            count is free; ``"per_token"``: one vector each (v1 models), so the count is fixed.
        initial_rois: ``"half"``: a square grid of RoIs half the picture wide, tokens beyond the square see
            all of it (as released); ``"tiles"``: as many tiles as tokens, side by side.
        initial_rois_learned: whether the initial RoIs are parameters. Calls with another token count than
            ``num_latents`` start from the layout of ``initial_rois`` either way.
        focusing_width: token width D inside the focusing transformer.
        focusing_heads: attention heads there.
        focusing_mlp_width: hidden width of its MLP.
        focusing_repeats: how often its one stage (shared weights) runs.
        focusing_order: the operations of one repeat, in order.
        focusing_norm_eps: epsilon of every layer norm outside cortex and head.
        stage_embedding: whether a learned vector per repeat tells the repeats apart.
        handover_order: the operations at full width, after the linear map to ``width``.
        handover_norm: whether a layer norm follows that linear map (v1 models).
        num_points: sampling points P per token, at least two.
        sampling_padding: what lies outside the picture: its border pixel, or zeros (v1 models).
        clip_point_gradients: clamp the gradient of a sampling coordinate to one map cell (v1 training).
        mixing_points: output points of the point mixing.
        mixing_bias: learned biases inside the mixing, with an activation between its two steps (v1 models).
        generator_width: hidden width of the layer that generates mixing weights in the focusing stage.
        handover_generator_width: the same in the hand-over.
        adjust_hidden: a hidden layer in the RoI adjustment (bootstrapped models) instead of one linear map.
        position_temperature: highest frequency of the RoI position code.
        width: token width D in the cortex: the source ViT's.
        depth: cortex blocks.
        heads: attention heads of a cortex block.
        mlp_width: hidden width of a cortex block's MLP.
        activation: activation of the cortex MLPs. OpenAI's CLIP needs ``"quick_gelu"``.
        qkv_bias: bias on the cortex' query, key and value projections.
        layer_scale: learned per-channel residual scales in the cortex (DINOv2).
        norm_eps: epsilon of the layer norms of cortex and head.
        entry_norm: the layer norm that CLIP puts before its first block; only of use when the cortex
            inherits that first block.
        pooling: how tokens become one vector: the class token, the mean of the latents, or attention from
            a learned probe (SigLIP).
        output_width: width E of the pooled embedding after projection; 0 for no projection.
        head_bias: bias on that projection.
    """

    stem_channels: int = 64
    num_latents: int = 48
    cls_token: bool = True
    token_embedding: TokenEmbedding = "shared"
    initial_rois: InitialRois = "half"
    initial_rois_learned: bool = True
    focusing_width: int = 384
    focusing_heads: int = 6
    focusing_mlp_width: int = 1536
    focusing_repeats: int = 4
    focusing_order: tuple[Operation, ...] = ("sample", "position", "attention", "mlp", "adjust")
    focusing_norm_eps: float = 1e-5
    stage_embedding: bool = True
    handover_order: tuple[Operation, ...] = ("sample", "position")
    handover_norm: bool = False
    num_points: int = 16
    sampling_padding: SamplingPadding = "border"
    clip_point_gradients: bool = False
    mixing_points: int = 32
    mixing_bias: bool = False
    generator_width: int = 128
    handover_generator_width: int = 128
    adjust_hidden: bool = True
    position_temperature: float = 128.0
    width: int = 768
    depth: int = 8
    heads: int = 12
    mlp_width: int = 3072
    activation: Activation = "gelu"
    qkv_bias: bool = True
    layer_scale: bool = False
    norm_eps: float = 1e-5
    entry_norm: bool = False
    pooling: Pooling = "cls"
    output_width: int = 1000
    head_bias: bool = True

    def __post_init__(self) -> None:
        # Lists come from JSON and YAML; the orders are stored as tuples so that equal configs compare equal.
        for name in ("focusing_order", "handover_order"):
            order: Any = getattr(self, name)
            if not isinstance(order, (list, tuple)):
                raise ValueError(f"{name} must be a list of operations, got {order!r}")
            object.__setattr__(self, name, tuple(order))
        self._check_types()
        self._check_numbers()
        self._check_words()
        self._check_fit()

    @property
    def num_tokens(self) -> int:
        """Tokens that leave the encoder when a call does not name a count: latents plus class token."""
        return self.num_latents + int(self.cls_token)

    @property
    def embedding_width(self) -> int:
        """Width E of the pooled embedding."""
        return self.output_width or self.width

    def replace(self, **changes: Any) -> SparseFormerConfig:
        """A copy with some fields changed, validated again.

        Raises:
            ValueError: for an unknown field or a value that does not fit.
        """
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "SparseFormerConfig") -> SparseFormerConfig:
        """Build from a mapping, refusing unknown fields.

        Args:
            values: field names and values; missing fields take their defaults.
            source: where the mapping came from, for messages.

        Raises:
            ValueError: naming the field, the source and the nearest valid spelling.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, sorted(known), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{source}: unknown architecture field {key!r}{hint}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                fits, wanted = isinstance(value, bool), "true or false"
            elif isinstance(field.default, int):
                fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
            elif isinstance(field.default, float):
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                fits, wanted = number and math.isfinite(value), "a finite number"
            elif isinstance(field.default, str):
                fits, wanted = isinstance(value, str), "a word"
            else:
                fits, wanted = all(isinstance(item, str) for item in value), "a list of words"
            if not fits:
                raise ValueError(f"{field.name} must be {wanted}, got {value!r}")

    def _check_numbers(self) -> None:
        positive = (
            "stem_channels", "num_latents", "focusing_width", "focusing_heads", "focusing_mlp_width",
            "focusing_repeats", "mixing_points", "generator_width", "handover_generator_width", "width",
            "depth", "heads", "mlp_width", "focusing_norm_eps", "norm_eps",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.output_width < 0:
            raise ValueError(f"output_width must be 0 (no projection) or more, got {self.output_width}")
        if self.num_points < 2:
            raise ValueError(
                f"num_points must be at least 2, got {self.num_points}: point offsets are divided by their "
                "own standard deviation, which one point does not have"
            )
        if self.position_temperature < 1:
            raise ValueError(f"position_temperature must be at least 1, got {self.position_temperature}")

    def _check_words(self) -> None:
        for name, words in _WORDS.items():
            value = getattr(self, name)
            if value not in words:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, words))}, got {value!r}")
        for name in ("focusing_order", "handover_order"):
            order = getattr(self, name)
            for operation in order:
                if operation not in _OPERATIONS:
                    raise ValueError(f"{name} knows {', '.join(map(repr, _OPERATIONS))}, got {operation!r}")
            if len(set(order)) != len(order):
                raise ValueError(f"{name} names an operation twice: {list(order)}")
            if "sample" not in order:
                raise ValueError(
                    f"{name} must contain 'sample', got {list(order)}: a token has to look somewhere"
                )

    def _check_fit(self) -> None:
        for width, heads in (("focusing_width", "focusing_heads"), ("width", "heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{heads}={getattr(self, heads)} does not divide {width}={getattr(self, width)}"
                )
        for order, width in (("focusing_order", "focusing_width"), ("handover_order", "width")):
            if "position" in getattr(self, order) and getattr(self, width) % 8:
                raise ValueError(
                    f"{width}={getattr(self, width)} must be a multiple of 8 for the position code in "
                    f"{order}: a sine and a cosine for each of four coordinates"
                )
        if self.pooling == "cls" and not self.cls_token:
            raise ValueError("pooling='cls' needs cls_token=true; without one use 'mean' or 'attention'")
        if self.head_bias and not self.output_width:
            raise ValueError("head_bias=true needs a projection: set output_width, or head_bias=false")
