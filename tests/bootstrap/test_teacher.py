"""The teacher's own behaviour, on a tiny timm ViT: frozen, halves that meet, refusals of names."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

timm = pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from bootstrap.data import DataConfig, build_stream  # noqa: E402
from bootstrap.objectives import match_handover, match_pooled, pool_rois  # noqa: E402
from bootstrap.targets import measure_spreads  # noqa: E402
from bootstrap.teacher import Teacher, TeacherError, load_teacher, spec_to_config  # noqa: E402
from bootstrap.teachers.spec import name_activation  # noqa: E402
from bootstrap.teachers.timm_vit import TimmTrunk  # noqa: E402
from sparse_vlm.packed import PackedLinear, can_pack  # noqa: E402
from sparse_vlm.rois import build_initial_rois  # noqa: E402

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(TimmTrunk(VisionTransformer(**TINY, proj_drop_rate=0.5), "timm:test"))  # type: ignore[arg-type]


def test_frozen_whatever_is_asked(teacher: Teacher) -> None:
    images = torch.randn(2, 3, 32, 32)
    before = teacher(images).pooled
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    holder = torch.nn.ModuleList([teacher])
    holder.train()  # what a training loop does to everything it holds
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher(images).pooled, before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(images.requires_grad_()).pooled.requires_grad
    assert not copy.deepcopy(teacher).train().trunk.training


def test_the_two_halves_meet(teacher: Teacher) -> None:
    images = torch.randn(2, 3, 32, 32)
    whole = teacher(images)
    assert whole.mid is None
    for block in range(5):
        output = teacher(images, at_block=block)
        assert output.mid.shape == (2, 16, 32)
        half = teacher(images, at_block=block, stop=True)
        assert half.pooled is None
        assert half.tokens is None
        assert half.cls is None
        assert torch.equal(half.mid, output.mid)
        tokens, pooled = teacher.run_from(torch.cat([half.mid_cls[:, None], half.mid], dim=1), block)
        torch.testing.assert_close(pooled, whole.pooled, rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[:, 1:], whole.tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[:, 0], whole.cls, rtol=0, atol=1e-5)
    assert whole.grid == (4, 4)


def test_stopping_saves_the_later_blocks(teacher: Teacher) -> None:
    seen = []
    model: Any = teacher.trunk.model
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: seen.append(index))
    teacher(torch.randn(1, 3, 32, 32), at_block=2, stop=True)
    assert seen == [0, 1]


def test_run_from_lets_gradients_through_to_the_tokens(teacher: Teacher) -> None:
    tokens = torch.randn(2, 6, 32, requires_grad=True)
    _, pooled = teacher.run_from(tokens, 2)
    pooled.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_calls_that_make_no_sense_are_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 3, 32, 32\), got \(1, 3, 40, 32\)"):
        teacher(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match="no state at block 5"):
        teacher(torch.zeros(1, 3, 32, 32), at_block=5)
    with pytest.raises(ValueError, match="where to stop"):
        teacher(torch.zeros(1, 3, 32, 32), stop=True)
    with pytest.raises(ValueError, match="no block 5"):
        teacher.run_from(torch.zeros(1, 2, 32), block=5)
    with pytest.raises(TeacherError, match="no text side"):
        teacher.encode_text(["a cat"])
    assert not teacher.has_text
    assert teacher.logit_scale is None


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor packs no bf16")
def test_bf16_for_asking_only_says_the_same(teacher: Teacher) -> None:
    images = torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(teacher).bfloat16()(images, at_block=2)
    names = teacher.vision_state_dict().keys()
    quick = copy.deepcopy(teacher).to_bf16()
    said = quick(images, at_block=2)
    for ours, theirs in ((said.mid, plain.mid), (said.tokens, plain.tokens), (said.pooled, plain.pooled)):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    packed = [module for module in quick.modules() if isinstance(module, PackedLinear)]
    assert any(module._packed is not None for module in packed)
    assert quick.vision_state_dict().keys() == names


def test_bf16(teacher: Teacher) -> None:
    output = teacher.to(torch.bfloat16)(torch.randn(1, 3, 32, 32), at_block=2)
    assert output.pooled.dtype == output.mid.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("ViT-B-32", None, r"ambiguous.*\./ViT-B-32.*open_clip:ViT-B-32/TAG"),
        ("vit_tiny_patch16_224", None, r"ambiguous.*timm:vit_tiny_patch16_224@pretrained"),
        ("owner/model", None, r"ambiguous.*\./owner/model.*hf:owner/model"),
        ("nonsense", None, r"ambiguous.*open_clip:nonsense/TAG or timm:nonsense@pretrained"),
        ("/nowhere/at/all", None, r"teacher '/nowhere/at/all': there is no such folder or file$"),
        ("open_clip:ViT-B-32", None, "without weights.*open_clip:ViT-B-32/TAG"),
        ("timm:vit_tiny_patch16_224", None, "without weights.*timm:vit_tiny_patch16_224@pretrained"),
        ("timm:vit_tiny_patch16_224@here", None, "after @ comes 'pretrained', got 'here'"),
        ("timm:", None, "names a library but no model"),
        ("hf:./nowhere", None, "no folder './nowhere'"),
        ("timm:vit_tiny_patch16_224", "nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("open_clip:ViT-B-32/no_such_tag", None, "no tag 'no_such_tag'; it has .*openai"),
        ("open_clip:ViT-B-32-quickgelu/laion2b_e16", None, "no tag 'laion2b_e16'"),
    ],
)
def test_names_are_refused_with_the_right_spelling(name: str, weights: str | None, words: str) -> None:
    with pytest.raises(TeacherError, match=words) as caught:
        load_teacher(name, weights)
    assert "\n" not in str(caught.value)


def test_misspelt_architectures_name_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(TeacherError, match="did you mean 'ViT-B-32'"):
        load_teacher("open_clip:ViT-B32", file)
    with pytest.raises(TeacherError, match="timm cannot build it"):
        load_teacher("timm:vit_huge_tiny", file)


def test_weights_beside_a_teacher_that_has_its_own_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1)}, file)
    for name in (str(tmp_path), "hf:owner/model", "open_clip:ViT-B-32/openai", "timm:vit_tiny@pretrained"):
        with pytest.raises(TeacherError, match="brings its own weights"):
            load_teacher(name, file)


def test_unknown_activations_are_refused() -> None:
    assert name_activation(torch.nn.GELU(approximate="tanh"), "x") == "gelu_tanh"
    for module in (torch.nn.ReLU(), torch.nn.SiLU(), torch.nn.GLU(), torch.nn.Tanh()):
        with pytest.raises(TeacherError, match="is none of gelu, quick_gelu, gelu_tanh"):
            name_activation(module, "a ViT")


def test_spec_to_config(teacher: Teacher) -> None:
    config = spec_to_config(teacher.spec)
    assert (config.width, config.depth, config.heads, config.mlp_width) == (32, 3, 2, 128)
    assert (config.output_width, config.head_bias, config.cls_token, config.num_latents) == (
        7,
        True,
        True,
        48,
    )
    assert config.norm_eps == 1e-6
    assert spec_to_config(teacher.spec, drop=0).depth == 4
    assert spec_to_config(teacher.spec, num_latents=9).num_tokens == 10
    with pytest.raises(ValueError, match="unknown architecture field 'num_latent'"):
        spec_to_config(teacher.spec, num_latent=9)
    with pytest.raises(ValueError, match="drop must be"):
        spec_to_config(teacher.spec, drop=4)
    average = Teacher(TimmTrunk(VisionTransformer(**TINY, global_pool="avg"), "timm:avg"))  # type: ignore[arg-type]
    assert (spec_to_config(average.spec).pooling, spec_to_config(average.spec).cls_token) == ("mean", True)
    odd = Teacher(TimmTrunk(VisionTransformer(**{**TINY, "embed_dim": 36}), "timm:odd"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timm:odd: width=36 must be a multiple of 8"):
        spec_to_config(odd.spec)


def _real_data() -> Path:
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    return Path(os.environ.get("SPARSE_VLM_REAL_DATA", default))


@pytest.mark.real_data
def test_real_vit_tiny_knows_its_pictures() -> None:
    folder = _real_data()
    weights, pictures = folder / "vit_tiny_augreg", folder / "imagenet_1000"
    if not (weights.is_dir() and pictures.is_dir()):
        pytest.skip(f"no real ViT-Ti and pictures in {folder} (SPARSE_VLM_REAL_DATA)")
    from sparse_vlm.transform import ImageTransform

    teacher = load_teacher(str(weights))
    assert teacher.spec.transform.mean == (0.5, 0.5, 0.5)
    transform = ImageTransform(teacher.spec.transform)
    files = sorted(pictures.glob("*.jpg"))[::16]
    right = 0
    for start in range(0, len(files), 25):
        batch = files[start : start + 25]
        images = torch.stack([transform(Image.open(file)) for file in batch])
        labels = torch.tensor([int(file.name.split("_")[0]) for file in batch])
        right += int((teacher(images).pooled.argmax(dim=1) == labels).sum())
    assert 0.73 <= right / len(files) <= 0.92


@pytest.mark.real_data
def test_guessing_the_mean_reaches_less_where_regions_are_matched() -> None:
    """The figures of docs/bootstrap.md; ``-rP`` prints them."""
    folder = _real_data()
    weights, pictures = folder / "vit_tiny_augreg", folder / "imagenet_1000"
    if not (weights.is_dir() and pictures.is_dir()):
        pytest.skip(f"no real ViT-Ti and pictures in {folder} (SPARSE_VLM_REAL_DATA)")
    teacher = load_teacher(str(weights))
    stream = build_stream(DataConfig(str(pictures), workers=0), teacher.spec.transform, 32)
    batches = [batch.images for batch in itertools.islice(stream, 8)]
    spreads, _ = measure_spreads(teacher, 4, batches)
    seen = [teacher(images, at_block=4) for images in batches]
    rois = build_initial_rois(48, "tiles").expand(32, -1, -1)
    reached = {}
    for name, spread in (("mid", spreads.mid), ("tokens", spreads.tokens)):
        regions = torch.cat([pool_rois(getattr(each, name), rois, teacher.spec.grid) for each in seen])
        mean = regions.mean((0, 1), keepdim=True).expand_as(regions)
        reached[name] = float(match_handover(mean, regions, spread))
    pooled = torch.cat([each.pooled for each in seen if each.pooled is not None])
    mean = pooled.mean(0, keepdim=True).expand_as(pooled)
    reached["pooled"] = float(match_pooled(mean, pooled, spreads.pooled))
    print(reached)
    assert reached == {
        "mid": pytest.approx(0.54, abs=0.03),
        "tokens": pytest.approx(0.61, abs=0.03),
        "pooled": pytest.approx(1.0, abs=0.02),
    }
