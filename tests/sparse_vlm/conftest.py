"""Tiny architectures of each family, for the tests of the library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from sparse_vlm import SparseFormer, SparseFormerConfig, TransformConfig, build_encoder

_SMALL = {
    "stem_channels": 8,
    "focusing_width": 16,
    "focusing_heads": 2,
    "focusing_mlp_width": 32,
    "focusing_repeats": 2,
    "num_points": 4,
    "mixing_points": 8,
    "generator_width": 8,
    "handover_generator_width": 8,
    "width": 32,
    "depth": 2,
    "heads": 4,
    "mlp_width": 64,
    "output_width": 10,
}
_V1_ORDER = ("attention", "adjust", "sample", "mlp")

TINY: dict[str, SparseFormerConfig] = {
    "bootstrapped": SparseFormerConfig(**_SMALL),  # type: ignore[arg-type]
    "latents": SparseFormerConfig(  # type: ignore[arg-type]
        **_SMALL, num_latents=49, cls_token=False, pooling="mean", initial_rois="tiles"
    ),
    "siglip": SparseFormerConfig(  # type: ignore[arg-type]
        **{**_SMALL, "output_width": 0},
        num_latents=6,
        cls_token=False,
        pooling="attention",
        activation="gelu_tanh",
        head_bias=False,
        initial_rois_learned=False,
    ),
    "dinov2": SparseFormerConfig(  # type: ignore[arg-type]
        **{**_SMALL, "output_width": 0},
        num_latents=6,
        layer_scale=True,
        entry_norm=True,
        head_bias=False,
        stage_embedding=False,
    ),
    "v1": SparseFormerConfig(  # type: ignore[arg-type]
        **_SMALL,
        num_latents=9,
        cls_token=False,
        token_embedding="per_token",
        focusing_order=_V1_ORDER,
        handover_order=_V1_ORDER,
        handover_norm=True,
        sampling_padding="zeros",
        clip_point_gradients=True,
        mixing_bias=True,
        adjust_hidden=False,
        stage_embedding=False,
        pooling="mean",
    ),
}


@pytest.fixture(scope="session")
def tiny_configs() -> dict[str, SparseFormerConfig]:
    """Tiny architectures by family."""
    return TINY


@pytest.fixture(params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


@pytest.fixture
def build_tiny(fill_by_formula: Callable[[SparseFormer], SparseFormer]) -> Callable[..., SparseFormer]:
    """Build a tiny encoder with formula weights, in evaluation mode."""

    def build(family: str = "bootstrapped", **changes: object) -> SparseFormer:
        transform = TransformConfig(image_size=32, interpolation="bilinear")
        return fill_by_formula(build_encoder(TINY[family].replace(**changes), transform)).eval()

    return build


@pytest.fixture
def pictures(formula_pictures: Callable[..., Tensor]) -> Tensor:
    """Three smooth pictures of 40 x 56 pixels."""
    return formula_pictures(3, 40, 56)
