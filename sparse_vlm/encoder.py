"""The SparseFormer: a vision encoder that sees with a handful of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .config import SparseFormerConfig
from .cortex import CortexTransformer
from .focusing import Focus, FocusingTransformer
from .heads import Head
from .stem import EarlyConvolution
from .transform import ImageTransform, TransformConfig


class EncoderOutput(NamedTuple):
    """What the encoder says about a batch of pictures.

    Attributes:
        tokens: (B, N, D), normalised, class token first where there is one: what a language model reads.
        rois: one (B, N_latent, 4) tensor per sampling step, in order: where each latent token looked, as
            (x1, y1, x2, y2) fractions of the picture. The class token has none.
        pooled: (B, E), in the output space of the ViT that the encoder was bootstrapped from.
        hidden_states: the cortex' input and the output of each of its blocks, each (B, N, D) and not
            normalised, if the call asked for them.
    """

    tokens: Tensor
    rois: tuple[Tensor, ...]
    pooled: Tensor
    hidden_states: tuple[Tensor, ...] | None


# torch.export.save writes down what a program returns by name. PyTorch has a way for named tuples since 2.5.
if hasattr(_pytree, "_register_namedtuple"):
    _pytree._register_namedtuple(EncoderOutput, serialized_type_name="sparse_vlm.EncoderOutput")


class SparseFormer(nn.Module):
    """Stem, focusing transformer, cortex transformer and head.

    From *Bootstrapping SparseFormers from Vision Foundation Models* (arXiv 2312.01987) and *SparseFormer*
    (arXiv 2304.03768).

    Args:
        config: the architecture.
        transform: how pictures become this encoder's input; by default 224 pixels, normalised to [-1, 1].
    """

    def __init__(self, config: SparseFormerConfig, transform: TransformConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.transform = ImageTransform(transform or TransformConfig())
        self.stem = EarlyConvolution(config.stem_channels)
        self.focusing = FocusingTransformer(config)
        self.cortex = CortexTransformer(config)
        self.head = Head(config)
        if self.stem.conv.weight.device.type != "meta":
            self.init_weights()

    @property
    def num_tokens(self) -> int:
        """Tokens per picture when a call does not say otherwise, class token included."""
        return self.config.num_tokens

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.stem.conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.stem.conv.weight.dtype

    def init_weights(self) -> None:
        """(Re-)initialise every parameter; after meta-device construction and ``to_empty`` too."""
        self.stem.init_weights()
        self.focusing.init_weights()
        self.cortex.init_weights()
        self.head.init_weights()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute focusing steps and cortex blocks in the backward pass instead of storing them."""
        self.focusing.grad_checkpointing = enable
        self.cortex.grad_checkpointing = enable

    def check_tokens(self, num_tokens: int) -> None:
        """See that this encoder runs with so many tokens per picture, class token included.

        Raises:
            ValueError: if it does not.
        """
        self.focusing.start(1, self._latents(num_tokens))

    def focus(self, images: Tensor, num_tokens: int | None = None) -> Focus:
        """Run stem and focusing transformer only; RoIs and sampling points of every step come with it.

        Args:
            images: (B, 3, H, W), normalised as :attr:`transform` does; any height and width.
            num_tokens: tokens per picture, class token included; by default :attr:`num_tokens`.

        Raises:
            TypeError: for what is no tensor.
            ValueError: for pictures of another shape or a count this encoder cannot run with.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor (see encoder.transform), got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have the shape (B, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(
                "images must be normalised floating-point pictures (see encoder.transform), "
                f"got {images.dtype}"
            )
        return self.focusing(self.stem(images.to(self.dtype)), self._latents(num_tokens))

    def forward(
        self, images: Tensor, num_tokens: int | None = None, hidden_states: bool = False
    ) -> EncoderOutput:
        """Encode a batch of pictures.

        Args:
            images: (B, 3, H, W), normalised as :attr:`transform` does; any height and width.
            num_tokens: tokens per picture, class token included; by default :attr:`num_tokens`.
            hidden_states: also return the cortex' states.

        Raises:
            ValueError: for pictures of another shape or a count this encoder cannot run with.
        """
        focus = self.focus(images, num_tokens)
        last, states = self.cortex(focus.tokens, hidden_states)
        tokens, pooled = self.head(last)
        return EncoderOutput(tokens, focus.rois, pooled, states)

    def save(self, directory: str | PathLike[str], provenance: Mapping[str, Any] | None = None) -> None:
        """Write an encoder directory (see :mod:`sparse_vlm.checkpoint`), atomically.

        Args:
            directory: where to; an encoder directory already there is replaced.
            provenance: teacher, data, steps, figures reached: whatever says where the weights come from.
        """
        from .checkpoint import save_encoder

        save_encoder(self, directory, provenance)

    def _latents(self, num_tokens: int | None) -> int:
        if num_tokens is None:
            return self.config.num_latents
        latents = num_tokens - int(self.config.cls_token)
        if latents < 1:
            least = 1 + int(self.config.cls_token)
            why = " (the class token and one that looks)" if self.config.cls_token else ""
            raise ValueError(f"num_tokens must be at least {least}{why}, got {num_tokens}")
        return latents
