"""The student's distances against a computation by hand."""

from __future__ import annotations

from dataclasses import dataclass
from unittest.mock import Mock

import pytest
import torch

from bootstrap.config import ObjectiveSettings
from bootstrap.objectives import match_handover, match_relations, match_tokens, pool_rois
from bootstrap.student import Spreads, Student, Targets, weigh
from bootstrap.targets import measure_spreads
from bootstrap.teacher import TeacherOutput
from sparse_vlm import SparseFormer, SparseFormerConfig, build_encoder
from tests.bootstrap.conftest import TINY_STUDENT

GRID = (3, 3)


@pytest.fixture
def encoder() -> SparseFormer:
    config = SparseFormerConfig(
        **{**TINY_STUDENT, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "output_width": 6}
    )
    torch.manual_seed(0)
    encoder = build_encoder(config)
    torch.nn.init.normal_(encoder.focusing.stage.adjust.weight, std=0.5)  # RoIs move
    return encoder


def _targets(final: bool) -> Targets:
    generator = torch.Generator().manual_seed(1)
    mid, tokens = (torch.randn(2, 9, 16, generator=generator) for _ in range(2))
    return Targets(mid, tokens, torch.randn(2, 6, generator=generator)) if final else Targets(mid, None, None)


@pytest.mark.parametrize(("regions", "step"), [("start", 0), ("now", -1)])
def test_targets_are_pooled_over_the_regions_asked_for(
    encoder: SparseFormer, regions: str, step: int
) -> None:
    settings = ObjectiveSettings(regions=regions)  # type: ignore[arg-type]
    spreads = Spreads(torch.full((16,), 2.0), torch.full((16,), 3.0), torch.ones(6))
    student = Student(encoder, settings, spreads, GRID)
    images, targets = torch.randn(2, 3, 32, 32), _targets(final=True)
    distances = student(images, targets)
    assert set(distances) == {"handover", "tokens", "pooled"}
    output = encoder(images, hidden_states=True)
    assert not torch.allclose(output.rois[0], output.rois[-1], atol=1e-3)
    assert output.hidden_states is not None
    assert targets.tokens is not None
    rois = output.rois[step]
    handover = match_handover(output.hidden_states[0][:, 1:], pool_rois(targets.mid, rois, GRID), spreads.mid)
    tokens = match_tokens(output.tokens[:, 1:], pool_rois(targets.tokens, rois, GRID), spreads.tokens)
    torch.testing.assert_close(distances["handover"], handover)
    torch.testing.assert_close(distances["tokens"], tokens)


def test_targets_and_similarities_keep_fp32_under_autocast(encoder: SparseFormer) -> None:
    settings = ObjectiveSettings(pooled=0.0, relations=1.0)
    spreads = Spreads(*(torch.ones(width) for width in (16, 16, 6)))
    student, images, targets = (
        Student(encoder, settings, spreads, GRID),
        torch.randn(2, 3, 32, 32),
        _targets(True),
    )
    # A residual stream has channels like these; in bf16 the next number after 1000 is 1004.
    mid, final = targets.mid + 1001.0, targets.tokens + 1001.0  # type: ignore[operator]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = student(images, Targets(mid, final, targets.pooled))
        warm = student(images, Targets(mid, None, None))
        output = encoder(images, hidden_states=True)
    rois = output.rois[0]
    handover = match_handover(output.hidden_states[0][:, 1:], pool_rois(mid, rois, GRID), spreads.mid)
    wanted = {
        "handover": handover,
        "tokens": match_tokens(output.tokens[:, 1:], pool_rois(final, rois, GRID), spreads.tokens),
        "relations": match_relations(output.pooled, targets.pooled),
    }
    for name, distance in wanted.items():
        torch.testing.assert_close(distances[name], distance, rtol=1e-5, atol=0)
    torch.testing.assert_close(warm["handover"], handover, rtol=1e-5, atol=0)


def test_the_warm_up_runs_the_focusing_transformer_alone(encoder: SparseFormer) -> None:
    student = Student(encoder, ObjectiveSettings(), Spreads(*(torch.ones(w) for w in (16, 16, 6))), GRID)
    distances = student(torch.randn(2, 3, 32, 32), _targets(final=False), num_tokens=10)
    assert set(distances) == {"handover"}
    distances["handover"].backward()
    assert encoder.cortex.blocks[0].attn.qkv.weight.grad is None  # type: ignore[union-attr]
    assert encoder.stem.conv.weight.grad is not None


def test_the_warm_up_and_the_joint_phase_compare_the_same_tokens() -> None:
    """With no block dropped, a CLIP's entry norm stands before what the teacher's first block reads."""
    torch.manual_seed(0)
    small = {**TINY_STUDENT, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "output_width": 6}
    encoder = build_encoder(SparseFormerConfig(**small, entry_norm=True))
    torch.nn.init.normal_(encoder.cortex.entry_norm.weight)
    student = Student(encoder, ObjectiveSettings(), Spreads(*(torch.ones(w) for w in (16, 16, 6))), GRID)
    images, targets = torch.randn(2, 3, 32, 32), _targets(final=True)
    warm = student(images, Targets(targets.mid, None, None))["handover"]
    torch.testing.assert_close(warm, student(images, targets)["handover"])


def test_a_channel_that_never_moves_keeps_a_small_unit() -> None:
    outputs = torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(0))
    outputs[..., 3] = 1.0
    answer = TeacherOutput(outputs[:, 0], outputs, None, outputs, None, GRID)
    teacher = Mock(return_value=answer)
    teacher.spec = Mock(width=16, embedding_width=16)
    spreads, _ = measure_spreads(teacher, 0, [torch.zeros(8, 3, 4, 4)])
    for spread in spreads:
        assert spread[3] == pytest.approx(1e-2 * float(spread.sum() / 16), rel=0.02)
        assert spread[0] == pytest.approx(1.0, abs=0.7)


def test_a_teacher_that_tells_no_pictures_apart_is_no_teacher() -> None:
    outputs = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0)).repeat(8, 1, 1)
    teacher = Mock(return_value=TeacherOutput(outputs[:, 0], outputs, None, outputs, None, GRID))
    teacher.spec = Mock(width=16, embedding_width=16)
    with pytest.raises(ValueError, match=r"the same about all of the first 8 pictures \(pooled\), so that"):
        measure_spreads(teacher, 0, [torch.zeros(8, 3, 4, 4)])
    outputs[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"says no numbers \(mid\): its weights are damaged"):
        measure_spreads(teacher, 0, [torch.zeros(8, 3, 4, 4)])


def test_the_published_idea_alone(encoder: SparseFormer) -> None:
    settings = ObjectiveSettings(handover=0, tokens=0, pooled=0, pooled_cosine=1, warmup=0)
    student = Student(encoder, settings, Spreads(*(torch.ones(w) for w in (16, 16, 6))), GRID)
    assert set(student(torch.randn(2, 3, 32, 32), _targets(final=True))) == {"pooled_cosine"}


@dataclass(frozen=True)
class OwnSettings(ObjectiveSettings):
    """With an objective that the project does not have."""

    mine: float = 0.0


def test_an_objective_of_ones_own_counts_by_its_weight() -> None:
    alone = {"handover": 0.0, "tokens": 0.0, "pooled": 0.0, "warmup": 0.0}
    settings = OwnSettings(mine=2.0, **alone)
    assert float(weigh({"mine": torch.tensor(3.0)}, settings, 0.5)) == 6.0
    with pytest.raises(ValueError, match="mine must be a number of 0 or more, got -1"):
        OwnSettings(mine=-1.0)
    with pytest.raises(ValueError, match="all objectives have weight 0"):
        OwnSettings(**alone)
