"""The SparseFormer as a transformers model, over the very modules of the encoder library.

Parameter names are those of an encoder directory, so its ``model.safetensors`` loads as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparse_vlm.compiling import is_compiling
from sparse_vlm.cortex import CortexTransformer
from sparse_vlm.focusing import FocusingTransformer
from sparse_vlm.graphed_calls import GraphedCalls
from sparse_vlm.heads import Head
from sparse_vlm.stem import EarlyConvolution

from .configuration_sparseformer import SparseFormerVisionConfig


@dataclass
class SparseFormerVisionOutput(BaseModelOutputWithPooling):
    """What the tower returns.

    Attributes:
        last_hidden_state: (B, N, D) normalised tokens, class token first where there is one.
        pooler_output: (B, E) pooled embedding; None for a tower without pooling head.
        hidden_states: L + 1 tensors (B, N, D): the cortex' input, the output of each block, and in place of
            the last block's the normalised tokens.
        rois: one (B, N_latent, 4) tensor per sampling step: xyxy fractions of the picture.
    """

    rois: tuple[Tensor, ...] | None = None


class SparseFormerVisionModel(PreTrainedModel):
    """A SparseFormer that transformers can build, load, save, shard and put into a LLaVA.

    Attention inside the tower is torch's scaled dot product attention, whatever ``attn_implementation``
    says: with a few dozen tokens there is nothing for another kernel to gain.

    Args:
        config: the architecture and how many tokens it makes.
    """

    config_class = SparseFormerVisionConfig
    config: SparseFormerVisionConfig
    base_model_prefix = "sparseformer"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = {"FocusingStage", "TransformerBlock"}  # noqa: RUF012 - the base class' own form
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: SparseFormerVisionConfig) -> None:
        super().__init__(config)
        core = config.core
        self.stem = EarlyConvolution(core.stem_channels)
        self.focusing = FocusingTransformer(core)
        self.cortex = CortexTransformer(core)
        self.head = Head(core)
        if not config.pooling_head:
            self.head.pool = None
            self.head.proj = nn.Identity()
        self.num_latents = config.num_tokens - int(core.cls_token)
        self._graphs: GraphedCalls[SparseFormerVisionOutput] | None = None
        self.post_init()

    def use_graphs(self, enable: bool = True) -> None:
        """Run through CUDA graphs, one launch a forward pass, wherever no gradients are taken.

        The first pictures of each batch size are slow: they are recorded. On other devices, with gradients
        and under a compiler everything stays as it was.
        """
        self._graphs = GraphedCalls(self._see, self) if enable else None

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether focusing steps and cortex blocks are recomputed in the backward pass."""
        return self.focusing.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.focusing.grad_checkpointing = enable
        self.cortex.grad_checkpointing = enable

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        num_tokens: int | None = None,
        **kwargs: Any,
    ) -> SparseFormerVisionOutput | tuple[Any, ...]:
        """Encode a batch of pictures.

        Args:
            pixel_values: (B, 3, H, W), normalised; any height and width.
            output_hidden_states: whether, or which of, the cortex' states are wanted; all are returned then.
                Index 0 alone is not offered: it reads as False here and in LLaVA.
            return_dict: False for a plain tuple.
            num_tokens: tokens of this call, class token included; by default the configuration's.
            kwargs: switches that other towers understand, passed along by LLaVA; without effect here.

        Raises:
            ValueError: for pictures of another shape or kind, or a count that this encoder cannot run with.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values must have the shape (B, 3, H, W), got {tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                "pixel_values must be normalised floating-point pictures (see the image processor), "
                f"got {pixel_values.dtype}"
            )
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        graphs = self._graphs if self._may_replay() else None
        latents = self.num_latents if num_tokens is None else self._count_latents(num_tokens)
        output = (graphs or self._see)(pixel_values, bool(output_hidden_states), latents)
        return output.to_tuple() if return_dict is False else output

    def _count_latents(self, num_tokens: int) -> int:
        least = 1 + int(self.cortex.cls_token is not None)
        if num_tokens < least:
            raise ValueError(f"num_tokens must be at least {least}, got {num_tokens}")
        return num_tokens - least + 1

    def _see(self, pixel_values: Tensor, wanted: bool, latents: int) -> SparseFormerVisionOutput:
        focus = self.focusing(self.stem(pixel_values.to(self.stem.conv.weight.dtype)), latents)
        last, states = self.cortex(focus.tokens, wanted)
        tokens, pooled = self.head(last)
        return SparseFormerVisionOutput(
            last_hidden_state=tokens,
            pooler_output=pooled if self.config.pooling_head else None,
            hidden_states=None if states is None else (*states[:-1], tokens),
            rois=focus.rois,
        )

    def _may_replay(self) -> bool:
        return self.stem.conv.weight.is_cuda and not torch.is_grad_enabled() and not is_compiling()

    @classmethod
    def from_encoder_directory(
        cls,
        directory: str | PathLike[str],
        num_tokens: int | None = None,
        pooling_head: bool = True,
        dtype: torch.dtype | None = None,
    ) -> SparseFormerVisionModel:
        """Read an encoder directory, strictly: a tensor missing, extra or misshapen is an error.

        Args:
            directory: the encoder directory.
            num_tokens: tokens per picture, class token included; by default the encoder's.
            pooling_head: keep the layers behind the pooled embedding.
            dtype: precision of the weights; by default the one they were saved in.
        """
        # By name: a model directory with its code inside ships this file without the encoder directory's.
        convert = import_module("llm_integration.hf.convert")
        model: SparseFormerVisionModel = convert.load_vision_model(directory, num_tokens, pooling_head, dtype)
        return model

    def save_encoder_directory(
        self,
        directory: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
        head_from: str | PathLike[str] | None = None,
    ) -> None:
        """Write an encoder directory from this model.

        Args:
            directory: where to.
            provenance: what is known about the weights.
            head_from: the encoder directory that lends its pooling head, where this tower has none, and its
                image transform, where this tower knows none.
        """
        convert = import_module("llm_integration.hf.convert")
        convert.build_encoder_from(self, head_from).save(directory, provenance)

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this, children first, for modules that own a parameter which was not loaded. The
        # core initialises itself by parts, so the first call for a part does all of it.
        for part in (self.stem, self.focusing, self.cortex, self.head):
            if any(module is child for child in part.modules()):
                _init_part(part)


@torch.no_grad()
def _init_part(part: nn.Module) -> None:
    """Initialise the parameters that were not loaded, and mark them as transformers marks loaded ones."""
    loaded = {p: p.detach().clone() for p in part.parameters() if getattr(p, "_is_hf_initialized", False)}
    if len(loaded) == len(list(part.parameters())):
        return
    part.init_weights()  # type: ignore[operator]
    for parameter in part.parameters():
        if parameter in loaded:
            parameter.copy_(loaded[parameter])
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
