"""SparseFormers inside transformers.

Importing this package registers the model with transformers' ``Auto`` classes; that is all it does. From then
on ``AutoModel`` reads encoder directories, and an unmodified ``LlavaForConditionalGeneration`` builds its
vision tower from a ``vision_config`` of type ``sparseformer_vision``.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPImageProcessor, CLIPImageProcessorPil

from .configuration_sparseformer import SparseFormerVisionConfig
from .convert import build_encoder_from, build_vision_model, load_vision_model
from .modeling_sparseformer import SparseFormerVisionModel, SparseFormerVisionOutput

__all__ = [
    "SparseFormerVisionConfig",
    "SparseFormerVisionModel",
    "SparseFormerVisionOutput",
    "build_encoder_from",
    "build_vision_model",
    "load_vision_model",
]

AutoConfig.register(SparseFormerVisionConfig.model_type, SparseFormerVisionConfig, exist_ok=True)
AutoModel.register(SparseFormerVisionConfig, SparseFormerVisionModel, exist_ok=True)
AutoImageProcessor.register(
    SparseFormerVisionConfig,
    image_processor_classes={"pil": CLIPImageProcessorPil, "torchvision": CLIPImageProcessor},
    exist_ok=True,
)
