"""Cortex blocks with a transformers ViT's weights compute what its blocks compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from bootstrap.teacher import Teacher, inherit_teacher, spec_to_config  # noqa: E402
from bootstrap.teachers.hf_vit import HfTrunk  # noqa: E402
from sparse_vlm.encoder import SparseFormer  # noqa: E402
from sparse_vlm.inherit import InheritPlan, convert_vision_state_dict  # noqa: E402
from sparse_vlm.transform import TransformConfig  # noqa: E402

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PLAIN = {**SHAPE, "intermediate_size": 48}
MODELS: dict[str, Callable[[], Any]] = {
    "clip_quick": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**PLAIN, projection_dim=24, hidden_act="quick_gelu")
    ),
    "clip_gelu": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**PLAIN, hidden_act="gelu")
    ),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PLAIN)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SHAPE)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**PLAIN), add_pooling_layer=False),
    "classifier": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**PLAIN, num_labels=7, layer_norm_eps=1e-6)
    ),
}


def build_model(family: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_blocks_and_head_equal_transformers(family: str) -> None:
    trunk = HfTrunk(build_model(family), "hf:test", TransformConfig(image_size=32))
    teacher = Teacher(trunk)
    narrow = {"stem_channels": 8, "mixing_points": 4, "num_points": 4, "focusing_repeats": 1}
    encoder = SparseFormer(spec_to_config(teacher.spec, 2, **narrow), teacher.spec.transform)
    report = inherit_teacher(encoder, teacher, InheritPlan(4, 2, 1, 1))
    tokens = torch.randn(2, 9, 32)
    expected = tokens
    for index, block in enumerate(encoder.cortex.blocks):
        expected = trunk.blocks[2 + index](expected, None)
        tokens = block(tokens)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    vision = trunk.vision
    if family == "siglip":
        pooled = vision.head(vision.post_layernorm(expected))
    else:
        norm = vision.post_layernorm if family.startswith("clip") else vision.layernorm
        pooled = norm(expected[:, 0])
        for layer in ("visual_projection", "classifier"):
            pooled = getattr(trunk.model, layer, torch.nn.Identity())(pooled)
    torch.testing.assert_close(encoder.head(tokens)[1], pooled, rtol=0, atol=1e-5)
    assert {row.source for row in report.tensors} == set(trunk.model.state_dict())


@pytest.mark.parametrize("family", MODELS)
def test_published_key_style_gives_the_same(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    model.save_pretrained(tmp_path)
    layout = HfTrunk(model, "hf:test", TransformConfig(image_size=32)).layout
    memory = convert_vision_state_dict(model.state_dict(), layout).tensors
    disk = convert_vision_state_dict(load_file(tmp_path / "model.safetensors"), layout).tensors
    assert memory.keys() == disk.keys()
    assert all(torch.equal(memory[key], disk[key]) for key in disk)


def test_whole_clip_keeps_its_text_side_apart() -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(vision_config=PLAIN, text_config={**text, "vocab_size": 50000})
    weights = convert_vision_state_dict(transformers.CLIPModel(config).state_dict(), "hf_clip")
    assert "proj.weight" in weights.tensors
    reasons = {weights.left_behind[key] for key in weights.left_behind if key.startswith("text_")}
    assert reasons == {"text side"}
