"""Cortex blocks with a timm ViT's weights compute what timm's blocks compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

timm = pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from bootstrap.teacher import Teacher, inherit_teacher, spec_to_config  # noqa: E402
from bootstrap.teachers.timm_vit import TimmTrunk  # noqa: E402
from sparse_vlm.encoder import SparseFormer  # noqa: E402
from sparse_vlm.inherit import InheritPlan  # noqa: E402
from sparse_vlm.inherit_convert import InheritanceError  # noqa: E402

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}
FAMILIES: dict[str, dict[str, Any]] = {
    "augreg": {},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "num_classes": 12},
    "clip_gelu": {"pre_norm": True, "num_classes": 12},
    "siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", "num_classes": 0},
    "siglip_with_class_token": {"global_pool": "map", "num_classes": 0},
    "dinov2": {"init_values": 0.1, "num_classes": 0},
    "registers": {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True, "num_classes": 0},
    "average": {"class_token": False, "global_pool": "avg"},
    "no_qkv_bias": {"qkv_bias": False},
}


def build_teacher(**changes: Any) -> Teacher:
    torch.manual_seed(0)
    model = VisionTransformer(**{**TINY, **changes})
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return Teacher(TimmTrunk(model, "timm:test"))


def small(teacher: Teacher, drop: int, **overrides: Any) -> SparseFormer:
    narrow = {"stem_channels": 8, "mixing_points": 4, "num_points": 4, "focusing_repeats": 1}
    return SparseFormer(spec_to_config(teacher.spec, drop, **narrow, **overrides), teacher.spec.transform)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_head_equal_timm(family: str) -> None:
    teacher = build_teacher(**FAMILIES[family])
    encoder = small(teacher, drop=2)
    report = inherit_teacher(encoder, teacher, InheritPlan(4, 2, 1, 1))
    model: Any = teacher.trunk.model  # type: ignore[union-attr]
    tokens = torch.randn(2, 9, 32)
    expected = tokens
    for index, block in enumerate(encoder.cortex.blocks):
        expected = model.blocks[2 + index](expected)
        tokens = block(tokens)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    # timm's head skips class token and registers by their number; this sequence has no registers.
    model.num_prefix_tokens = int(teacher.spec.has_cls)
    _, pooled = encoder.head(tokens)
    torch.testing.assert_close(pooled, model.forward_head(model.norm(expected)), rtol=0, atol=1e-5)
    assert {row.source for row in report.tensors} == set(model.state_dict())


@pytest.mark.parametrize("no_embed_class", [True, False])
def test_class_token_starts_where_the_teachers_does_on_any_grid(no_embed_class: bool) -> None:
    teacher = build_teacher(img_size=(32, 64), no_embed_class=no_embed_class)
    encoder = small(teacher, drop=0)
    inherit_teacher(encoder, teacher, InheritPlan.thirds(4, drop=0))
    theirs = teacher.trunk.embed(torch.randn(1, 3, 32, 64))[:, :1]
    torch.testing.assert_close(encoder.cortex.cls_token, theirs)


def test_nothing_dropped_keeps_the_entry_norm() -> None:
    teacher = build_teacher(**FAMILIES["clip"])
    encoder = small(teacher, drop=0)
    inherit_teacher(encoder, teacher, InheritPlan.thirds(4, drop=0))
    model: Any = teacher.trunk.model  # type: ignore[union-attr]
    tokens = torch.randn(2, 9, 32)
    torch.testing.assert_close(encoder.cortex.entry_norm(tokens), model.norm_pre(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "wrong"), [("clip", "gelu"), ("augreg", "quick_gelu"), ("siglip", "gelu")]
)
def test_wrong_activation_is_refused_because_it_matters(family: str, wrong: str) -> None:
    teacher = build_teacher(**FAMILIES[family])
    encoder = small(teacher, drop=2, activation=wrong)
    with pytest.raises(InheritanceError, match="activation"):
        inherit_teacher(encoder, teacher, InheritPlan(4, 2, 1, 1))
    # What the refusal guards against: a block with the right weights and the wrong activation is off.
    right = small(teacher, drop=2)
    inherit_teacher(right, teacher, InheritPlan(4, 2, 1, 1))
    encoder.load_state_dict(right.state_dict())
    tokens = torch.randn(2, 9, 32)
    off = (encoder.cortex.blocks[0](tokens) - right.cortex.blocks[0](tokens)).abs().max()
    assert off > 1e-4
