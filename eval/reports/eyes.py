"""Where the model of a finished run looks: its tower's RoIs, without loading its language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from eval.answers import InputError
from llm_integration.hf import SparseFormerVisionConfig, SparseFormerVisionModel
from llm_integration.load import load_llava_config
from llm_integration.result import base_of, is_result, load_tower
from sparse_vlm.draw import pick_colours
from sparse_vlm.transform import ImageTransform, TransformConfig

_TOWER = "vision_tower."
_DRAWN_WHOLE = 0.97  # as in sparse_vlm.draw: such a RoI is a frame


@dataclass(frozen=True)
class Step:
    """One look at one picture.

    Attributes:
        name: "first look" or "last look".
        boxes: x, y, width, height of every RoI in fractions of the photograph, largest first.
        colours: One a box, the same for a token in every step.
        whole: RoIs that span all that the encoder sees.
    """

    name: str
    boxes: tuple[tuple[float, float, float, float], ...]
    colours: tuple[str, ...]
    whole: int


@dataclass(frozen=True)
class Look:
    """What an encoder did with one picture.

    Attributes:
        crop: x, y, width, height of what it sees, in fractions of the photograph.
        steps: The first look and the last.
    """

    crop: tuple[float, float, float, float]
    steps: tuple[Step, ...]


class Eyes:
    """A SparseFormer's stem and focusing transformer, out of a LLaVA.

    Args:
        model: The tower.
        transform: Its image transform.
    """

    def __init__(self, model: SparseFormerVisionModel, transform: TransformConfig) -> None:
        self.model = model.eval()
        self.transform = ImageTransform(transform)

    @torch.no_grad()
    def look(self, picture: Image.Image) -> Look:
        """RoIs of the first step and of the last, over a photograph of any size."""
        dtype = self.model.stem.conv.weight.dtype
        pixels = self.transform(picture).unsqueeze(0).to(dtype)
        focus = self.model.focusing(self.model.stem(pixels), self.model.num_latents)
        crop = crop_of(self.transform.config, picture.width, picture.height)
        rois = [step[0].float() for step in focus.rois]
        colours = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pick_colours(rois[0].double().numpy())]
        named = {"first look": rois[0], "last look": rois[-1]}
        return Look(crop, tuple(_place(name, step, colours, crop) for name, step in named.items()))


def _place(name: str, rois: Tensor, colours: Sequence[str], crop: tuple[float, ...]) -> Step:
    left, top, width, height = crop
    boxes = []
    whole = 0
    for (x1, y1, x2, y2), colour in zip(rois.tolist(), colours, strict=True):
        x1, y1 = (min(max(v, 0.0), 1.0) for v in (min(x1, x2), min(y1, y2)))
        x2, y2 = (min(max(v, 0.0), 1.0) for v in (max(x1, x2), max(y1, y2)))
        if min(x2 - x1, y2 - y1) >= _DRAWN_WHOLE:
            whole += 1
            continue
        boxes.append(((left + x1 * width, top + y1 * height, (x2 - x1) * width, (y2 - y1) * height), colour))
    boxes.sort(key=lambda pair: -pair[0][2] * pair[0][3])
    return Step(name, tuple(box for box, _ in boxes), tuple(colour for _, colour in boxes), whole)


def crop_of(config: TransformConfig, width: int, height: int) -> tuple[float, float, float, float]:
    """What an encoder sees of a picture: x, y, width, height in fractions of it.

    Args:
        config: The encoder's transform.
        width: Of the picture in pixels.
        height: Of the picture in pixels.
    """
    resized_height, resized_width = config.resized_size(height, width)
    wide, high = config.width / resized_width, config.height / resized_height
    return (1 - wide) / 2, (1 - high) / 2, wide, high


def load_eyes(directory: Path) -> Eyes | None:
    """The eyes of a LLaVA directory, or of the result of a tuning; None if its tower is no SparseFormer.

    Adapters sit in the cortex only, so they do not change where a token looks.

    Raises:
        InputError: If the model is not there or cannot be read.
    """
    try:
        base = base_of(directory)
        vision: Any = load_llava_config(base).vision_config
        if not isinstance(vision, SparseFormerVisionConfig):
            return None
        if vision.transform is None:
            raise ValueError(f"{base} does not say how its tower wants pictures")
        weights = load_tower(base)
        if is_result(directory):
            _update(weights, directory)
        with torch.device("meta"):
            model = SparseFormerVisionModel(vision)
        model.load_state_dict(weights, strict=True, assign=True)
        return Eyes(model, TransformConfig.from_dict(vision.transform))
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"The RoIs of {directory} cannot be drawn: {error}") from None


def _update(weights: dict[str, Tensor], result: Path) -> None:
    """Writes what a tuning changed in the tower over what it began with."""
    for path in (*sorted(result.glob("trained*.safetensors")), *sorted(result.glob("adapter/*.safetensors"))):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                own = name.rpartition(_TOWER)[2]
                if _TOWER in name and own in weights:
                    weights[own] = file.get_tensor(name)
