"""The SparseFormer as LLaVA's vision tower.

LLaVA (``haotian-liu/LLaVA``) asks its tower for a handful of attributes and calls, spread over its builder,
trainer and evaluation scripts; this class answers all of them with an encoder directory behind it. It needs
torch and this package's core only; transformers is touched when a picture is prepared.

A *frozen* encoder stays out of the module tree: DeepSpeed, peft and ``save_pretrained`` never see it, it
keeps its fp32 weights whatever the language model's precision, and checkpoints carry no copy of it. An
encoder that is to be *tuned* is registered like any other module.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.checkpoint import MODEL_TYPE, load_config, load_encoder
from sparse_vlm.compiling import is_compiling
from sparse_vlm.encoder import SparseFormer
from sparse_vlm.graphed_calls import GraphedCalls

from .llava.image_processor import EncoderImageProcessor

_FEATURES = ("patch", "cls_patch")


@dataclass(frozen=True)
class TowerConfig:
    """What LLaVA and its users read off ``tower.config``, known before the weights are.

    Attributes:
        hidden_size: width D of a visual token.
        image_size: edge of the square picture the image processor makes, in pixels; (height, width) where
            the encoder's transform is not square.
        num_hidden_layers: cortex blocks L.
        num_tokens: tokens that leave the encoder, class token included.
        cls_token: whether the first of them is a class token.
        model_type: the encoder directory's.
    """

    hidden_size: int
    image_size: int | tuple[int, int]
    num_hidden_layers: int
    num_tokens: int
    cls_token: bool
    model_type: str = MODEL_TYPE


class SparseFormerVisionTower(nn.Module):
    """LLaVA's vision tower contract over an encoder directory.

    ``mm_vision_select_layer`` counts the L + 1 states of the cortex as transformers counts hidden states: 0
    is its input, L (or -1) its end. The end is normalised by the encoder's final norm, as the encoder was
    bootstrapped; states before it are not. ``mm_vision_select_feature`` ``"patch"`` drops the class token
    where there is one, ``"cls_patch"`` keeps every token; :attr:`num_patches` follows.

    Args:
        directory: the encoder directory.
        args: LLaVA's model arguments or its model config; missing attributes take LLaVA's defaults.
        delay_load: read the configuration only. LLaVA asks for it where a model is built on the meta
            device: no parameter may exist then.

    Raises:
        EncoderDirectoryError: if the directory cannot be read.
        ValueError: for settings that make no sense for tokens without a grid, or that do not fit the encoder.
    """

    encoder: SparseFormer

    def __init__(self, directory: str | PathLike[str], args: Any = None, delay_load: bool = False) -> None:
        super().__init__()
        self.vision_tower_name = str(directory)
        config, transform = load_config(directory)
        size = transform.image_size
        self.config = TowerConfig(
            hidden_size=config.width,
            image_size=size,
            num_hidden_layers=config.depth,
            num_tokens=config.num_tokens,
            cls_token=config.cls_token,
        )
        self.image_processor = EncoderImageProcessor(transform)
        check_arguments(args)
        self.select_layer = int(getattr(args, "mm_vision_select_layer", -1))
        self.select_feature = str(getattr(args, "mm_vision_select_feature", "patch") or "patch")
        self._check_selection()
        self.tuned = bool(getattr(args, "unfreeze_mm_vision_tower", False))
        self.is_loaded = False
        self._graphs: GraphedCalls[Tensor] | None = None
        if not delay_load:
            self.load_model()

    def load_model(self, device_map: str | int | torch.device | Mapping[str, Any] | None = None) -> None:
        """Read the weights; a second call does nothing.

        Args:
            device_map: None for the CPU (LLaVA moves the tower afterwards), a device in any spelling,
                ``"auto"`` for the current accelerator, or an accelerate map of module names to devices.
        """
        if self.is_loaded:
            return
        # fp32 whatever was saved: a tuned tower comes back from bf16, and its arithmetic should not.
        encoder = load_encoder(self.vision_tower_name, device=_choose_device(device_map), dtype=torch.float32)
        object.__setattr__(self, "encoder", encoder.requires_grad_(False))
        self.is_loaded = True
        self.tune(self.tuned)

    def tune(self, enable: bool = True) -> None:
        """Register the encoder and let gradients through, or freeze it and take it out of the module tree."""
        self.tuned = enable
        if not self.is_loaded:
            return
        encoder = self.encoder
        self._modules.pop("encoder", None)
        self.__dict__.pop("encoder", None)
        if enable:
            self.encoder = encoder
            self.train(self.training)
        else:
            object.__setattr__(self, "encoder", encoder.eval())
        encoder.requires_grad_(False)
        self.requires_grad_(enable)

    def use_graphs(self, enable: bool = True) -> None:
        """Run a frozen encoder through CUDA graphs: one launch for each batch of pictures.

        The first pictures of each batch size are slow: they are recorded. A tuned tower, other devices and
        a compiler see no difference.

        Raises:
            RuntimeError: if the weights are not loaded yet.
        """
        self._graphs = None
        if enable:
            self._check_loaded()
            self._graphs = GraphedCalls(self._select, self.encoder)

    def requires_grad_(self, requires_grad: bool = True) -> SparseFormerVisionTower:
        """Set gradients of a tuned encoder, except where the chosen layer does not depend on a parameter.

        DistributedDataParallel stops at parameters that never receive a gradient: the pooling head and the
        blocks behind the chosen layer stay frozen.
        """
        if self.is_loaded and self.tuned:
            for name, parameter in self.encoder.named_parameters():
                parameter.requires_grad_(requires_grad and self._contributes(name))
        return self

    def to(self, *args: Any, **kwargs: Any) -> SparseFormerVisionTower:
        """Move the tower; a frozen one keeps its precision, and a tuned one too where it may.

        LLaVA casts its tower to bf16, and to fp16 even when it trains in fp32, where Adam would divide by
        zero. A tuned tower keeps fp32 weights under autocast instead; DeepSpeed's own cast still reaches it.
        Under ZeRO-3 every parameter has to have the engine's precision before the engine exists.
        """
        if self.tuned and not _zero3_is_on():
            kwargs.pop("dtype", None)
            args = tuple(value for value in args if not isinstance(value, torch.dtype))
            args = tuple(value.device if isinstance(value, Tensor) else value for value in args)
            if not args and not kwargs:
                return self
        return super().to(*args, **kwargs)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Encode pictures.

        Args:
            images: (B, 3, H, W), or a list of (3, H, W) or (B, 3, H, W), each of its own size.

        Returns:
            (B, N, D) in the pictures' precision, or a list of such.
        """
        if isinstance(images, (list, tuple)):
            return [self._encode(image if image.ndim == 4 else image.unsqueeze(0)) for image in images]
        return self._encode(images)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the encoder's weights; features come in that of the pictures."""
        return self.encoder.dtype if self.is_loaded else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.encoder.device if self.is_loaded else torch.device("cpu")

    @property
    def dummy_feature(self) -> Tensor:
        """One token of zeros, (1, D)."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """Width D of a visual token."""
        return self.config.hidden_size

    @property
    def num_patches(self) -> int:
        """Visual tokens per picture that the language model really receives."""
        return self.config.num_tokens - int(self._drops_class_token)

    @property
    def num_patches_per_side(self) -> int:
        """Square root of :attr:`num_patches`, for callers that want one; the tokens form no grid.

        Raises:
            ValueError: if the count is not a square.
        """
        side = math.isqrt(self.num_patches)
        if side * side != self.num_patches:
            raise ValueError(
                f"the {self.num_patches} visual tokens of {self.vision_tower_name} are not a square number "
                "and have no patches per side; use num_patches, and mm_patch_merge_type 'flat'"
            )
        return side

    @property
    def gradient_checkpointing(self) -> bool:
        """Recompute the encoder of a tuned tower in the backward pass; transformers sets it."""
        return self.is_loaded and self.encoder.focusing.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        if self.is_loaded:
            self.encoder.set_grad_checkpointing(enable and self.tuned)

    @property
    def _drops_class_token(self) -> bool:
        return self.config.cls_token and self.select_feature == "patch"

    @property
    def _layer(self) -> int:
        depth = self.config.num_hidden_layers
        return self.select_layer if self.select_layer >= 0 else depth + 1 + self.select_layer

    def _encode(self, images: Tensor) -> Tensor:
        self._check_loaded()
        placed = images.to(self.device)
        if self.tuned:
            return self._select(placed).to(images.dtype)
        # An fp32 encoder inside the Trainer's autocast would compute in bf16 and move its RoIs.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            graphs = self._graphs if self._may_replay() else None
            return (graphs or self._select)(placed).to(images.dtype)

    def _may_replay(self) -> bool:
        return self.device.type == "cuda" and not is_compiling()

    def _check_loaded(self) -> None:
        if not self.is_loaded:
            raise RuntimeError(
                f"the vision tower {self.vision_tower_name} has no weights yet: call load_model() first"
            )

    def _select(self, images: Tensor) -> Tensor:
        last = self._layer == self.config.num_hidden_layers
        output = self.encoder(images, hidden_states=not last)
        tokens = output.tokens if last else output.hidden_states[self._layer]
        return tokens[:, 1:] if self._drops_class_token else tokens

    def _contributes(self, name: str) -> bool:
        """Whether the features depend on a parameter of the encoder."""
        depth, order = self.config.num_hidden_layers, self.encoder.config.handover_order
        if name.startswith("head."):
            return name.startswith("head.norm.") and self._layer == depth
        if name.startswith("cortex.blocks."):
            return int(name.split(".")[2]) < self._layer
        if name.startswith("focusing.handover.adjust"):
            return "sample" in order[order.index("adjust") :]
        return True

    def _check_selection(self) -> None:
        depth = self.config.num_hidden_layers
        if not -depth - 1 <= self.select_layer <= depth:
            raise ValueError(
                f"mm_vision_select_layer={self.select_layer} is outside the cortex of "
                f"{self.vision_tower_name}: it has {depth} blocks, so {-depth - 1} (its input) to {depth} "
                "(its end, the same as -1) exist"
            )
        if self.select_feature not in _FEATURES:
            raise ValueError(
                f"mm_vision_select_feature must be 'patch' (all but the class token) or 'cls_patch' "
                f"(all tokens), got {self.select_feature!r}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseFormerVisionTower:
        super()._apply(fn, recurse)
        if self.is_loaded and not self.tuned:
            # The frozen encoder is not in the tree: let an empty tensor find out where everything goes.
            target = fn(torch.empty(0, device=self.device)).device
            if target.type != "meta" and target != self.device:
                self.encoder.to(target)
        return self

    def extra_repr(self) -> str:
        """Name, token count, and whether the hidden encoder is there."""
        state = ("tuned" if self.tuned else "frozen") if self.is_loaded else "not loaded"
        return f"{self.vision_tower_name!r}, num_patches={self.num_patches}, {state}"


def check_arguments(args: Any) -> None:
    """Refuse LLaVA settings that need a grid of patches.

    Raises:
        ValueError: naming the setting and what would be right.
    """
    merge = getattr(args, "mm_patch_merge_type", None) or "flat"
    if merge != "flat":
        raise ValueError(
            f"mm_patch_merge_type={merge!r} lays visual tokens out as a grid, and a SparseFormer's tokens "
            "look wherever they like; use 'flat' (with image_aspect_ratio 'anyres' too, if you want tiles)"
        )
    if getattr(args, "s2", False):
        raise ValueError("s2=True scales a grid of patches, which a SparseFormer does not have; leave it out")


def _choose_device(device_map: str | int | torch.device | Mapping[str, Any] | None) -> torch.device:
    if isinstance(device_map, Mapping):
        covers = [key for key in device_map if "model.vision_tower".startswith(key)]
        device_map = device_map[max(covers, key=len)] if covers else next(iter(device_map.values()), None)
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device_map is None or device_map == "disk":
        return torch.device("cpu")
    if isinstance(device_map, int):
        return torch.device("cuda", device_map)
    return torch.device(device_map)


def _zero3_is_on() -> bool:
    if "deepspeed" not in sys.modules:
        return False
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())
