"""Pictures for LLaVA, prepared by the encoder's own transform."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from sparse_vlm.transform import ImageTransform, TransformConfig


class EncoderImageProcessor:
    """The encoder's own image transform behind the face of a transformers image processor.

    Args:
        config: sizes, interpolation and pixel statistics.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, config: TransformConfig) -> None:
        self.transform = ImageTransform(config)
        self.image_mean = list(config.mean)
        self.image_std = list(config.std)
        self.size = {"shortest_edge": min(config.height, config.width)}
        self.crop_size = {"height": config.height, "width": config.width}

    def preprocess(self, images: Any, return_tensors: str | None = None) -> Any:
        """Prepare one picture or a list of them.

        Args:
            images: Pillow pictures of any mode, or uint8 arrays (H, W, 3) or (H, W).
            return_tensors: ``"pt"``, ``"np"``, or None for a list of arrays.

        Returns:
            A transformers ``BatchFeature`` whose ``pixel_values`` are (B, 3, H, W), fp32.

        Raises:
            TypeError: for something that is not a picture.
            ValueError: for another kind of tensors.
        """
        from transformers import BatchFeature

        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {return_tensors!r}")
        pictures = images if isinstance(images, (list, tuple)) else [images]
        tensors = [self.transform(_as_picture(picture)) for picture in pictures]
        values: Any
        if return_tensors == "pt":
            values = torch.stack(tensors)  # (B, 3, H, W)
        elif return_tensors == "np":
            values = torch.stack(tensors).numpy()  # (B, 3, H, W)
        else:
            values = [tensor.numpy() for tensor in tensors]
        return BatchFeature({"pixel_values": values})

    __call__ = preprocess

    def __repr__(self) -> str:
        return f"EncoderImageProcessor({self.transform.config})"


def _as_picture(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        return Image.fromarray(value)
    described = type(value).__name__
    if isinstance(value, np.ndarray):
        described = f"a {value.dtype} array of shape {value.shape}"
    raise TypeError(f"expected a Pillow picture or a uint8 array (H, W, 3), got {described}")
