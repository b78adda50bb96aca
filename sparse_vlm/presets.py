"""The published architectures by name, with the image transform each was trained with."""

from __future__ import annotations

import difflib

from .config import SparseFormerConfig
from .transform import OPENAI_MEAN, OPENAI_STD, TransformConfig

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = (OPENAI_MEAN, OPENAI_STD)


def _v1(num_latents: int, focusing_width: int, width: int, depth: int) -> SparseFormerConfig:
    """*SparseFormer* (arXiv 2304.03768). Its first full-width unit is our hand-over, so ``depth`` is one less
    than the number of full-width units that the paper counts."""
    order = ("attention", "adjust", "sample", "mlp")
    return SparseFormerConfig(
        stem_channels=96,
        num_latents=num_latents,
        cls_token=False,
        token_embedding="per_token",
        focusing_width=focusing_width,
        focusing_heads=64,
        focusing_mlp_width=4 * focusing_width,
        focusing_order=order,  # type: ignore[arg-type]
        focusing_norm_eps=1e-6,
        stage_embedding=False,
        handover_order=order,  # type: ignore[arg-type]
        handover_norm=True,
        num_points=36,
        sampling_padding="zeros",
        mixing_points=36,
        mixing_bias=True,
        generator_width=focusing_width // 4,
        handover_generator_width=width // 4,
        adjust_hidden=False,
        width=width,
        depth=depth,
        heads=64,
        mlp_width=4 * width,
        norm_eps=1e-6,
        pooling="mean",
        output_width=1000,
    )


def _bootstrapped(base: bool, clip: bool, num_latents: int) -> SparseFormerConfig:
    """*Bootstrapping SparseFormers* (arXiv 2312.01987): the upper two thirds of a ViT-B or ViT-L."""
    width, focusing_width = (768, 384) if base else (1024, 512)
    return SparseFormerConfig(
        num_latents=num_latents,
        focusing_width=focusing_width,
        focusing_heads=focusing_width // 64,
        focusing_mlp_width=4 * focusing_width,
        width=width,
        depth=8 if base else 16,
        heads=width // 64,
        mlp_width=4 * width,
        activation="quick_gelu" if clip else "gelu",
        output_width=(512 if base else 768) if clip else 1000,
        head_bias=not clip,
    )


PRESETS: dict[str, tuple[SparseFormerConfig, TransformConfig]] = {
    name: (
        config,
        TransformConfig(image_size=224, resize_size=256, interpolation="bilinear", mean=mean, std=std),
    )
    for name, config, (mean, std) in (
        ("sparseformer_v1_tiny", _v1(49, 256, 512, 7), _IMAGENET),
        ("sparseformer_v1_small", _v1(64, 320, 640, 7), _IMAGENET),
        ("sparseformer_v1_base", _v1(81, 384, 768, 9), _IMAGENET),
        ("sparseformer_btsp_augreg_base", _bootstrapped(True, False, 48), _INCEPTION),
        ("sparseformer_btsp_augreg_large", _bootstrapped(False, False, 48), _INCEPTION),
        ("sparseformer_btsp_openai_clip_base", _bootstrapped(True, True, 48), _CLIP),
        ("sparseformer_btsp_openai_clip_large", _bootstrapped(False, True, 63), _CLIP),
    )
}


def load_preset(name: str) -> tuple[SparseFormerConfig, TransformConfig]:
    """Architecture and image transform of a published model.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}known: {', '.join(PRESETS)}")
    return PRESETS[name]
