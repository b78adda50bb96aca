"""Training views: random resized crop and mirror, a pure function of (seed, picture index, view)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from PIL import Image

from bootstrap.data.config import DataConfig
from bootstrap.data.decode import Region, decode_picture, decode_region
from sparse_vlm.transform import RESAMPLING, ImageTransform, TransformConfig, pixels_to_tensor

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): scatters 64 bits over 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def view_seed(seed: int, index: int, view: int) -> int:
    """64-bit seed of one view of one picture; the same on every machine, rank and worker.

    Args:
        seed: of the run.
        index: of the picture in its source.
        view: number of the view: the epoch, or `epoch % views`.
    """
    return _mix(_mix(_mix(seed & _MASK) ^ (index & _MASK)) ^ (view & _MASK))


def _uniforms(seed: int) -> Iterator[float]:
    while True:
        seed = _mix(seed)
        yield (seed >> 11) / (1 << 53)


def random_region(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], flip: bool, seed: int
) -> Region:
    """Draws a crop: area uniform within `scale`, log of width / height uniform within `ratio`.

    Ten draws are made; if none fits into the picture, the largest centred crop of an allowed ratio is taken
    (torchvision's RandomResizedCrop does the same).
    """
    draw = _uniforms(seed)
    mirrored = next(draw) < 0.5 and flip
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * next(draw))
        log_ratio = math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * next(draw)
        place_x, place_y = next(draw), next(draw)
        crop_width = max(round(math.sqrt(area * math.exp(log_ratio))), 1)
        crop_height = max(round(math.sqrt(area / math.exp(log_ratio))), 1)
        if crop_width <= width and crop_height <= height:
            left = int(place_x * (width - crop_width + 1))
            top = int(place_y * (height - crop_height + 1))
            return Region(left, top, left + crop_width, top + crop_height, mirrored)
    crop_width = max(min(width, round(height * ratio[1])), 1)
    crop_height = max(min(height, round(width / ratio[0])), 1)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return Region(left, top, left + crop_width, top + crop_height, mirrored)


@dataclasses.dataclass(frozen=True)
class TrainView:
    """Random crop, mirror, resize and normalisation for training.

    Attributes:
        transform: gives the size of the result, the interpolation, mean and std.
        scale: share of the area a crop covers, smallest and largest.
        ratio: width / height of a crop, smallest and largest.
        flip: mirror half of the views.
        seed: of the run.
        max_pixels: most pixels to decode at once.
    """

    transform: TransformConfig
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    seed: int = 0
    max_pixels: int = 80_000_000

    @classmethod
    def from_config(cls, config: DataConfig, transform: TransformConfig) -> TrainView:
        """The views that the data settings ask for."""
        return cls(
            transform=transform,
            scale=config.scale,
            ratio=config.ratio,
            flip=config.flip,
            seed=config.seed,
            max_pixels=config.max_pixels,
        )

    def __call__(self, data: bytes, index: int, view: int) -> torch.Tensor:
        """Decodes and shows one view.

        Args:
            data: the encoded picture.
            index: of the picture in its source.
            view: number of the view.

        Returns:
            (3, H, W) normalised fp32 tensor.

        Raises:
            BadPictureError: the picture cannot be decoded.
        """
        return pixels_to_tensor(self.crop(data, index, view), self.transform.mean, self.transform.std)

    def crop(self, data: bytes, index: int, view: int) -> Image.Image:
        """The RGB pixels of a view, before normalisation."""
        seed = view_seed(self.seed, index, view)

        def choose(width: int, height: int) -> Region:
            return random_region(width, height, self.scale, self.ratio, self.flip, seed)

        size = (self.transform.height, self.transform.width)
        return decode_region(data, choose, size, RESAMPLING[self.transform.interpolation], self.max_pixels)


@dataclasses.dataclass(frozen=True)
class EvalView:
    """The encoder's own inference transform in the place of a random view."""

    transform: TransformConfig
    max_pixels: int = 80_000_000

    def __call__(self, data: bytes, index: int, view: int) -> torch.Tensor:
        """Decodes the whole picture and transforms it; `index` and `view` change nothing.

        Returns:
            (3, H, W) normalised fp32 tensor.
        """
        return ImageTransform(self.transform)(decode_picture(data, self.max_pixels))
