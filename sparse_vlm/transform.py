"""From a picture of any mode to the normalised tensor an encoder was trained with.

The transform travels with the weights. It needs Pillow and torch only, and gives the very same bits as
open_clip's inference transform and timm's evaluation transform on Pillow pictures.

A picture is first made RGB, then resized, then cropped: the order of timm, transformers and open_clip's own
shard reader. (open_clip's bare transform converts last, which for palette pictures means nearest-neighbour
resizing; RGB and grey pictures come out equal either way.) EXIF orientation is left alone, as all three do.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Above this many pixels an enlarged strip (say 1 x 5000 pixels) is cropped before it is resized.
_LARGEST_RESIZED_PIXELS = 1 << 26

# What Pillow raises for files that are broken, no pictures, or too large.
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclasses.dataclass(frozen=True)
class TransformConfig:
    """How a picture becomes an encoder's input.

    Attributes:
        image_size: height and width of the result in pixels; one integer means a square.
        resize: "shortest" keeps the aspect ratio and makes the picture just cover `resize_size`; "squash"
            resizes to exactly `resize_size`.
        resize_size: size to resize to before the centre crop; None means `image_size`. With "shortest" an
            integer is the length of the shorter edge, a pair is a (height, width) to cover.
        interpolation: "bicubic" or "bilinear", both antialiased.
        mean: three channel means subtracted after scaling pixels to 0..1.
        std: three channel deviations divided by.
    """

    image_size: int | tuple[int, int] = 224
    resize: Literal["shortest", "squash"] = "shortest"
    resize_size: int | tuple[int, int] | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _as_size("image_size", self.image_size))
        if self.resize_size is not None:
            object.__setattr__(self, "resize_size", _as_size("resize_size", self.resize_size))
        object.__setattr__(self, "mean", _as_channels("mean", self.mean))
        object.__setattr__(self, "std", _as_channels("std", self.std))
        if min(self.std) <= 0:
            raise ValueError(f"transform: std must be positive in every channel, got {self.std}")
        if self.resize not in ("shortest", "squash"):
            hint = (
                " ('longest' pads with borders, which is not supported)"
                if str(self.resize) == "longest"
                else ""
            )
            raise ValueError(f"transform: resize must be 'shortest' or 'squash', got {self.resize!r}{hint}")
        if self.interpolation not in RESAMPLING:
            raise ValueError(
                f"transform: interpolation must be 'bicubic' or 'bilinear', got {self.interpolation!r}"
            )
        height, width = self.resized_at_least
        if height < self.height or width < self.width:
            raise ValueError(
                f"transform: resize_size {self.resize_size} is smaller than image_size {self.image_size}, "
                "so the crop would reach outside the picture; make resize_size at least image_size"
            )

    @property
    def height(self) -> int:
        """Rows of the result in pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        """Columns of the result in pixels."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]

    @property
    def resized_at_least(self) -> tuple[int, int]:
        """(height, width) every picture has at least after resizing ("squash": exactly)."""
        size = self.image_size if self.resize_size is None else self.resize_size
        return (size, size) if isinstance(size, int) else size

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which a picture of `height` x `width` pixels is resized before the crop."""
        target_height, target_width = self.resized_at_least
        if self.resize == "squash":
            return target_height, target_width
        if target_height == target_width:
            # torchvision's Resize(int): the longer edge is truncated.
            if width <= height:
                return int(target_height * height / width), target_height
            return target_height, int(target_height * width / height)
        # timm's ResizeKeepRatio: both edges are rounded.
        ratio = min(height / target_height, width / target_width)
        return round(height / ratio), round(width / ratio)

    def prepares_like(self, other: TransformConfig) -> bool:
        """Whether every picture comes out the same, however sizes are written."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("height", "width", "resized_at_least", "resize", "interpolation", "mean", "std")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "transform") -> TransformConfig:
        """Reads what `to_dict` wrote, strictly.

        Args:
            values: exactly the fields of this class.
            source: name of the file or section, for error messages.

        Raises:
            ValueError: an unknown or missing key, or a value out of place.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; valid keys are {', '.join(names)}"
                raise ValueError(f"{source}: unknown key {key!r}{hint}")
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"{source}: missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @classmethod
    def from_open_clip(cls, preprocess: Mapping[str, Any]) -> TransformConfig:
        """Translates open_clip's `preprocess_cfg` (size, mean, std, interpolation, resize_mode)."""
        size = preprocess.get("size", 224)
        resize: Any = preprocess.get("resize_mode") or "shortest"
        interpolation: Any = preprocess.get("interpolation") or "bicubic"
        if interpolation == "random":
            interpolation = "bicubic"  # open_clip's inference transform reads it so
        square = isinstance(size, int) or size[-2] == size[-1]
        if resize == "shortest" and not square:
            interpolation = "bicubic"  # open_clip does not hand the choice on for non-square sizes
        return cls(
            image_size=size if isinstance(size, int) else tuple(size[-2:]),
            resize=resize,
            interpolation=interpolation,
            mean=preprocess.get("mean") or OPENAI_MEAN,
            std=preprocess.get("std") or OPENAI_STD,
        )

    @classmethod
    def from_timm(cls, data_config: Mapping[str, Any]) -> TransformConfig:
        """Translates what timm's `resolve_data_config` returns (input_size, crop_pct, mean, ...)."""
        height, width = data_config["input_size"][-2:]
        crop_fraction = data_config.get("crop_pct") or 0.875
        crop_mode = data_config.get("crop_mode") or "center"
        if crop_mode == "border":
            raise ValueError("transform: timm's crop_mode 'border' pads with borders, which is not supported")
        return cls(
            image_size=(height, width),
            resize="squash" if crop_mode == "squash" else "shortest",
            resize_size=(math.floor(height / crop_fraction), math.floor(width / crop_fraction)),
            interpolation=data_config.get("interpolation") or "bilinear",
            mean=data_config["mean"],
            std=data_config["std"],
        )


class ImageTransform:
    """Turns one picture into one normalised tensor.

    Args:
        config: sizes, interpolation and pixel statistics.
    """

    def __init__(self, config: TransformConfig) -> None:
        self.config = config

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Converts, resizes, crops and normalises a Pillow picture of any mode.

        Returns:
            (3, H, W) fp32 tensor on the CPU.
        """
        return pixels_to_tensor(self.crop(picture), self.config.mean, self.config.std)

    def crop(self, picture: Image.Image) -> Image.Image:
        """The RGB pixels the encoder sees, before normalisation."""
        config = self.config
        picture = to_rgb(picture)
        width, height = picture.size
        if width == 0 or height == 0:
            raise ValueError(f"cannot transform an empty picture of {width} x {height} pixels")
        resized_height, resized_width = config.resized_size(height, width)
        # The rounding (halves to even) is torchvision's.
        top = round((resized_height - config.height) / 2.0)
        left = round((resized_width - config.width) / 2.0)
        resampling = RESAMPLING[config.interpolation]
        if resized_height * resized_width > _LARGEST_RESIZED_PIXELS:
            scale_y, scale_x = height / resized_height, width / resized_width
            box = (
                left * scale_x,
                top * scale_y,
                min((left + config.width) * scale_x, width),
                min((top + config.height) * scale_y, height),
            )
            return picture.resize((config.width, config.height), resampling, box=box)
        if (resized_width, resized_height) != picture.size:
            picture = picture.resize((resized_width, resized_height), resampling)
        return picture.crop((left, top, left + config.width, top + config.height))

    def __repr__(self) -> str:
        return f"ImageTransform({self.config})"


def pixels_to_tensor(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Scales an RGB picture to 0..1 and normalises it per channel.

    Returns:
        (3, H, W) fp32 tensor.
    """
    width, height = picture.size
    planes = bytearray(b"".join(channel.tobytes() for channel in picture.split()))  # Pillow splits fastest
    tensor = torch.frombuffer(planes, dtype=torch.uint8).view(3, height, width).to(torch.float32).div_(255)
    mean_column = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
    std_column = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
    return tensor.sub_(mean_column).div_(std_column)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts a Pillow picture of any mode to RGB; an RGB picture is returned as it is.

    Alpha is dropped, as `convert("RGB")` does. Pixels of more than 8 bits are scaled, where Pillow would clip
    them: "I;16" always by 257, "I" by 257 if any value is above 255, "F" from 0..1, 0..255 or 0..65535, the
    smallest of the three that holds its largest value.

    Raises:
        TypeError: for what is no Pillow picture.
    """
    if not isinstance(picture, Image.Image):
        found = type(picture).__name__
        raise TypeError(f"expected a Pillow picture (PIL.Image.open reads a file), got {found}")
    if picture.mode == "RGB":
        return picture
    if picture.mode == "F" or picture.mode.startswith("I"):
        return _deep_to_rgb(picture)
    if picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # the same colours; the direct way warns
    elif picture.mode == "La":
        picture = picture.convert("LA")  # Pillow has no direct way
    return picture.convert("RGB")


def _deep_to_rgb(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(values.max(initial=0.0))
    if picture.mode.startswith("I;16") or largest > 255:
        values = values / 257
    elif picture.mode == "F" and largest <= 1:
        values = values * 255
    pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


def _as_size(name: str, value: object) -> int | tuple[int, int]:
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or any(
        isinstance(edge, bool) or not isinstance(edge, int) or edge < 1 for edge in pair
    ):
        raise ValueError(
            f"transform: {name} must be a positive integer or a pair (height, width) of them, got {value!r}"
        )
    height, width = cast("tuple[int, int]", tuple(pair))
    return height if height == width else (height, width)


def _as_channels(name: str, value: object) -> tuple[float, ...]:
    numbers = value if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 3 or any(
        isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number)
        for number in numbers
    ):
        raise ValueError(f"transform: {name} must be three finite numbers, one a channel, got {value!r}")
    return tuple(float(number) for number in numbers)
