"""Where the tower of a LLaVA looks in a picture, drawn."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from sparse_vlm import TransformConfig
from sparse_vlm.draw import draw_rois
from sparse_vlm.look import crop_large

from .generate import Chat
from .hf import SparseFormerVisionModel
from .processor import pad_square, pads_pictures


class NoRegionsError(ValueError):
    """A vision tower that has no regions of interest; the sentence says which one it is."""


@torch.no_grad()
def draw_regions(
    chat: Chat, picture: Image.Image, columns: int = 3, panel_width: int = 480, theme: str = "light"
) -> Image.Image:
    """Run a LLaVA's tower on a picture and draw where each of its tokens looks at every step.

    Args:
        chat: the model, with its processor.
        picture: any Pillow picture.
        columns: panels in a row.
        panel_width: width of a panel in pixels.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        An RGB picture, one panel per step.

    Raises:
        NoRegionsError: for a tower that is no SparseFormer, or that does not know its image transform.
    """
    tower: Any = chat.model.model.vision_tower
    if not isinstance(tower, SparseFormerVisionModel):
        raise NoRegionsError(
            f"This model's vision tower is a {type(tower).__name__}, not a SparseFormer: it reads the whole "
            "picture and has no regions to show."
        )
    if tower.config.transform is None:
        raise NoRegionsError(
            "This model's tower does not know its image transform, so its regions cannot be placed."
        )
    transform = TransformConfig.from_dict(tower.config.transform, "vision_config.transform")
    pixels = chat.processor.image_processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
    seen = pad_square(picture, chat.processor) if pads_pictures(chat.processor) else picture
    weight = tower.stem.conv.weight
    stem = tower.stem(pixels.to(weight.device, weight.dtype))
    focus = tower.focusing(stem, tower.num_latents)
    return draw_rois(
        crop_large(transform, seen, panel_width),
        [rois[0] for rois in focus.rois],
        [points[0] for points in focus.points],
        columns=columns,
        panel_width=panel_width,
        theme=theme,
    )
