"""Cortex blocks with an open_clip model's weights compute what its blocks compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

open_clip = pytest.importorskip("open_clip")

from bootstrap.teacher import Teacher, inherit_teacher, spec_to_config  # noqa: E402
from bootstrap.teachers.open_clip_vit import build_open_clip_trunk  # noqa: E402
from sparse_vlm.encoder import SparseFormer  # noqa: E402
from sparse_vlm.inherit import InheritPlan  # noqa: E402

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "layers": 4, "width": 32, "head_width": 16}


def build_teacher(quick_gelu: bool = False, **vision: Any) -> Teacher:
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=24, vision_cfg={**VISION, **vision}, text_cfg=TEXT, quick_gelu=quick_gelu
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return Teacher(build_open_clip_trunk(model, "open_clip:test"))


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.1, "no_ln_pre": True}])
def test_blocks_and_head_equal_open_clip(quick_gelu: bool, vision: dict[str, Any]) -> None:
    teacher = build_teacher(quick_gelu, **vision)
    assert teacher.spec.activation == ("quick_gelu" if quick_gelu else "gelu")
    narrow = {"stem_channels": 8, "mixing_points": 4, "num_points": 4, "focusing_repeats": 1}
    encoder = SparseFormer(spec_to_config(teacher.spec, 1, **narrow), teacher.spec.transform)
    inherit_teacher(encoder, teacher, InheritPlan(4, 1, 1, 2))
    visual: Any = teacher.trunk.model.visual  # type: ignore[union-attr]
    tokens = torch.randn(2, 9, 32)
    expected = tokens
    for index, block in enumerate(encoder.cortex.blocks):
        expected = visual.transformer.resblocks[1 + index](expected)
        tokens = block(tokens)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    pooled, _ = visual._pool(expected)
    torch.testing.assert_close(encoder.head(tokens)[1], pooled @ visual.proj, rtol=0, atol=1e-5)


def test_whole_model_and_image_side_give_the_same() -> None:
    from sparse_vlm.inherit import convert_vision_state_dict

    teacher = build_teacher()
    model: Any = teacher.trunk.model  # type: ignore[union-attr]
    whole = convert_vision_state_dict(model.state_dict(), "open_clip_vit")
    side = convert_vision_state_dict(model.visual.state_dict(), "open_clip_vit")
    assert whole.tensors.keys() == side.tensors.keys()
    assert all(torch.equal(whole.tensors[key], side.tensors[key]) for key in side.tensors)
    assert "token_embedding.weight" in whole.left_behind
