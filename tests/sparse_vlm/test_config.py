"""The architecture's configuration: what it refuses, and with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sparse_vlm import PRESETS, SparseFormerConfig, build_encoder
from sparse_vlm.presets import load_preset

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_latents": 0}, "num_latents must be greater than 0, got 0"),
    ({"depth": -1}, "depth must be greater than 0"),
    ({"norm_eps": 0.0}, "norm_eps must be greater than 0"),
    ({"num_points": 1}, "num_points must be at least 2.*standard deviation, which one point does not have"),
    ({"output_width": -1}, "output_width must be 0"),
    ({"position_temperature": 0.5}, "position_temperature must be at least 1"),
    ({"width": "768"}, "width must be a whole number, got '768'"),
    ({"width": True}, "width must be a whole number, got True"),
    ({"cls_token": 1}, "cls_token must be true or false, got 1"),
    ({"norm_eps": "small"}, "norm_eps must be a finite number"),
    ({"norm_eps": float("nan")}, "norm_eps must be a finite number, got nan"),
    ({"position_temperature": float("inf")}, "position_temperature must be a finite number, got inf"),
    ({"activation": 3}, "activation must be a word"),
    ({"focusing_order": [1, 2]}, "focusing_order must be a list of words"),
    ({"activation": "relu"}, "activation must be one of 'gelu', 'quick_gelu', 'gelu_tanh', got 'relu'"),
    ({"pooling": "max"}, "pooling must be one of"),
    ({"token_embedding": "none"}, "token_embedding must be one of"),
    ({"initial_rois": "random"}, "initial_rois must be one of"),
    ({"sampling_padding": "wrap"}, "sampling_padding must be one of"),
    ({"focusing_order": ["sample", "jump"]}, "focusing_order knows .*got 'jump'"),
    ({"handover_order": ["sample", "sample"]}, "handover_order names an operation twice"),
    ({"focusing_order": ["attention"]}, "must contain 'sample'.*a token has to look somewhere"),
    ({"handover_order": ["position"]}, "handover_order must contain 'sample'"),
    ({"heads": 7}, "heads=7 does not divide width=768"),
    ({"focusing_heads": 5}, "focusing_heads=5 does not divide focusing_width=384"),
    ({"width": 12, "heads": 4}, "width=12 must be a multiple of 8 for the position code in handover_order"),
    ({"focusing_width": 36}, "focusing_width=36 must be a multiple of 8 .*focusing_order"),
    ({"cls_token": False}, "pooling='cls' needs cls_token=true"),
    ({"output_width": 0}, "head_bias=true needs a projection"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseFormerConfig(**changes)


def test_unknown_field_names_key_source_and_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"some\.yaml: unknown architecture field 'num_latent'.*'num_latents'"
    ):
        SparseFormerConfig.from_dict({"num_latent": 49}, source="some.yaml")
    with pytest.raises(ValueError, match=r"some\.yaml: heads=7 does not divide"):
        SparseFormerConfig.from_dict({"heads": 7}, source="some.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_dict_round_trip_through_json(name: str) -> None:
    config = PRESETS[name][0]
    again = SparseFormerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_replace_validates_again() -> None:
    config = SparseFormerConfig()
    assert config.replace(num_latents=63).num_tokens == 64
    with pytest.raises(ValueError, match="num_points"):
        config.replace(num_points=1)
    with pytest.raises(ValueError, match="unknown architecture field 'widht'; did you mean 'width'"):
        config.replace(widht=8)


def test_counts_and_widths_tell_the_truth() -> None:
    assert SparseFormerConfig().num_tokens == 49
    assert SparseFormerConfig(num_latents=49, cls_token=False, pooling="mean").num_tokens == 49
    assert SparseFormerConfig().embedding_width == 1000
    assert SparseFormerConfig(output_width=0, head_bias=False).embedding_width == 768


# Millions of parameters and tokens, as published.
PUBLISHED = {
    "sparseformer_v1_tiny": (32, 49),
    "sparseformer_v1_small": (48, 64),
    "sparseformer_v1_base": (81, 81),
    "sparseformer_btsp_augreg_base": (64, 49),
    "sparseformer_btsp_augreg_large": (212, 49),
    "sparseformer_btsp_openai_clip_base": (64, 49),
    "sparseformer_btsp_openai_clip_large": (212, 64),
}


def test_presets_have_the_published_sizes() -> None:
    assert list(PRESETS) == list(PUBLISHED)
    for name, (millions, tokens) in PUBLISHED.items():
        with torch.device("meta"):
            encoder = build_encoder(name)
        assert round(sum(p.numel() for p in encoder.parameters()) / 1e6) == millions, name
        assert encoder.num_tokens == tokens, name


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'sparseformer_v1_tiny'.*known: "):
        load_preset("sparseformer_v1_tin")
    with pytest.raises(ValueError, match="unknown preset"):
        build_encoder("resnet50")


def test_preset_brings_its_transform() -> None:
    with_clip = load_preset("sparseformer_btsp_openai_clip_base")[1]
    assert (with_clip.image_size, with_clip.resize_size) == (224, 256)
    assert with_clip.mean == (0.48145466, 0.4578275, 0.40821073)
    assert load_preset("sparseformer_btsp_augreg_base")[1].mean == (0.5, 0.5, 0.5)
