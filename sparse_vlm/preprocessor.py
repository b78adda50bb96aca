"""`preprocessor_config.json`: an image transform in the fields of transformers' image processors.

`AutoImageProcessor.from_pretrained(encoder_directory, backend="pil")` then prepares pictures as the encoder's
own transform does, bit for bit. Three differences are transformers' own: its centre crop starts one pixel
earlier where the number of pixels to cut away is 3, 7, 11, ...; newer versions lay transparent pictures on
white; and it cannot cover a non-square size (see `is_exact`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .transform import OPENAI_MEAN, OPENAI_STD, TransformConfig

_PILLOW_CODES = {"bilinear": 2, "bicubic": 3}
_INTERPOLATIONS = {code: name for name, code in _PILLOW_CODES.items()}
# transformers' class defaults: resample, centre crop, mean, std. Files often leave them out.
_HALF = (0.5, 0.5, 0.5)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {
        "resample": 3,
        "do_center_crop": True,
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    },
    "BitImageProcessor": {
        "resample": 3,
        "do_center_crop": True,
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    },
    "SiglipImageProcessor": {"resample": 3, "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
    "ViTImageProcessor": {"resample": 2, "do_center_crop": False, "image_mean": _HALF, "image_std": _HALF},
}
# Marks a non-square size that is covered, not squashed to: transformers has no words for it.
_COVER_KEY = "sparse_vlm_resize"


def is_exact(config: TransformConfig) -> bool:
    """Whether transformers' fields can say all that `config` says."""
    height, width = config.resized_at_least
    return config.resize == "squash" or height == width


def to_preprocessor_dict(config: TransformConfig) -> dict[str, Any]:
    """Fields of `preprocessor_config.json` for `CLIPImageProcessor`.

    Returns:
        JSON values that `from_preprocessor_dict` turns back into an equal transform.
    """
    height, width = config.resized_at_least
    covers_square = config.resize == "shortest" and height == width
    fields: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if covers_square else {"height": height, "width": width},
        "resample": _PILLOW_CODES[config.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": config.height, "width": config.width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    if not is_exact(config):
        fields[_COVER_KEY] = "shortest"
    return fields


def from_preprocessor_dict(
    fields: Mapping[str, Any], source: str = "preprocessor_config.json"
) -> TransformConfig:
    """Reads our own file or that of a CLIP, SigLIP, ViT or DINOv2 (Bit) image processor of transformers.

    Args:
        fields: the parsed file; a `processor_config.json` with an "image_processor" section works too.
        source: the file's name, for error messages.

    Raises:
        ValueError: a processor or a setting that this transform cannot follow.
    """
    if isinstance(fields.get("image_processor"), Mapping):
        fields = fields["image_processor"]
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type") or "CLIPImageProcessor"
    name = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in _DEFAULTS:
        raise ValueError(f"{source}: image processor {kind!r} is not one of {', '.join(sorted(_DEFAULTS))}")
    known = {**_DEFAULTS[name], **{key: value for key, value in fields.items() if value is not None}}
    for key in ("do_resize", "do_rescale"):
        if not known.get(key, True):
            raise ValueError(f"{source}: {key} must be true, got {known[key]!r}")
    if known.get("do_pad") or "crop_pct" in known:
        raise ValueError(f"{source}: padding (do_pad) and crop_pct are not supported")
    factor = known.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"{source}: rescale_factor must be 1/255, got {factor!r}")
    if known["resample"] not in _INTERPOLATIONS:
        raise ValueError(f"{source}: resample must be 2 (bilinear) or 3 (bicubic), got {known['resample']!r}")

    size = known.get("size", 224)
    shortest: int | None = None
    squashed: tuple[int, int] | None = None
    if isinstance(size, int):
        # Old files: one number is the shorter edge for CLIP and Bit, and both edges for the others.
        shortest, squashed = (size, None) if known["do_center_crop"] else (None, (size, size))
    elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        shortest = size["shortest_edge"]
    elif isinstance(size, Mapping) and set(size) == {"height", "width"}:
        squashed = (size["height"], size["width"])
    else:
        raise ValueError(
            f"{source}: size must be {{'shortest_edge': n}} or {{'height': h, 'width': w}}, got {size!r}"
        )
    if known["do_center_crop"]:
        crop = known.get("crop_size", 224)
        if isinstance(crop, Mapping) and set(crop) == {"height", "width"}:
            image_size = (crop["height"], crop["width"])
        elif isinstance(crop, int):
            image_size = (crop, crop)
        else:
            raise ValueError(f"{source}: crop_size must be n or {{'height': h, 'width': w}}, got {crop!r}")
    elif squashed is not None:
        image_size = squashed
    else:
        raise ValueError(f"{source}: size {size!r} without do_center_crop gives pictures of no fixed size")
    normalise = known.get("do_normalize", True)
    resized = squashed if squashed is not None else (shortest, shortest)
    covers = shortest is not None or known.get(_COVER_KEY) == "shortest"
    try:
        return TransformConfig(
            image_size=image_size,
            resize="shortest" if covers else "squash",
            resize_size=None if resized == tuple(image_size) else resized,  # type: ignore[arg-type]
            interpolation=_INTERPOLATIONS[known["resample"]],  # type: ignore[arg-type]
            mean=known["image_mean"] if normalise else (0.0, 0.0, 0.0),
            std=known["image_std"] if normalise else (1.0, 1.0, 1.0),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
