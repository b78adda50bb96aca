"""Our encoder inside an open_clip model, for code that knows open_clip only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eval.answers import InputError
from sparse_vlm import SparseFormer


class VisualEncoder(nn.Module):
    """An encoder with the face of open_clip's `model.visual`: pictures in, pooled embeddings out.

    `preprocess_cfg` is what open_clip builds a model's image transform from, so that its own loaders prepare
    pictures as this encoder was trained.

    Args:
        encoder: The encoder.
        num_tokens: Of a picture; the encoder's own by default.
    """

    def __init__(self, encoder: SparseFormer, num_tokens: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_tokens = num_tokens
        transform = encoder.transform.config
        self.image_size = (transform.height, transform.width)
        self.preprocess_cfg = {
            "size": self.image_size,
            "mean": transform.mean,
            "std": transform.std,
            "interpolation": transform.interpolation,
            "resize_mode": transform.resize,
        }
        self.output_dim = encoder.config.output_width or encoder.config.width

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, E) of pictures (B, 3, H, W), not normalised."""
        pooled: Tensor = self.encoder(images, self.num_tokens).pooled
        return pooled


def replace_visual(model: Any, encoder: SparseFormer, num_tokens: int | None = None) -> Any:
    """Puts an encoder in place of an open_clip model's `visual`; the model is changed and returned.

    Args:
        model: A CLIP of open_clip; the encoder must have been bootstrapped from its picture side.
        encoder: The encoder.
        num_tokens: Of a picture; the encoder's own by default.

    Raises:
        InputError: If the embeddings' widths differ, or open_clip's transforms cannot prepare pictures as the
            encoder needs them.
    """
    transform = encoder.transform.config
    if transform.resized_at_least != (transform.height, transform.width):
        raise InputError(
            f"The encoder's pictures are resized to {transform.resized_at_least} and then cropped to "
            f"{(transform.height, transform.width)}; open_clip's transform resizes to the crop's size only."
        )
    visual = VisualEncoder(encoder, num_tokens)
    width = getattr(model.visual, "output_dim", None)
    if width is not None and width != visual.output_dim:
        raise InputError(
            f"The model's joint space has width {width}, the encoder's {visual.output_dim}: it was made from "
            "another teacher."
        )
    model.visual = visual
    return model
