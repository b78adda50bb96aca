"""open_clip teachers: outputs equal open_clip's, folders and files load, the text side works offline."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

open_clip = pytest.importorskip("open_clip")

from safetensors.torch import save_file  # noqa: E402
from timm.models import register_model  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from bootstrap.teacher import Teacher, TeacherError, inherit_teacher, load_teacher, spec_to_config  # noqa: E402
from bootstrap.teachers import open_clip_load  # noqa: E402
from bootstrap.teachers.open_clip_vit import build_open_clip_trunk  # noqa: E402
from sparse_vlm.encoder import SparseFormer  # noqa: E402
from sparse_vlm.inherit import InheritPlan  # noqa: E402

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
# timm's own miniature with a projection, and one pooled like open_clip's SigLIPs, without.
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
SIGLIP = {"image_size": 32, "timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none"}


@register_model
def tiny_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A SigLIP's image tower for open_clip to find among timm's models."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    given = {key: options[key] for key in ("num_classes", "global_pool")}
    model = VisionTransformer(**shape, **given, class_token=False, act_layer="gelu_tanh")
    model.default_cfg = {}
    return model


def build_config(vision: dict[str, Any], quick_gelu: bool = False) -> dict[str, Any]:
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": quick_gelu}
    return {**config, "custom_text": True} if "timm_model_name" in vision else config


def build_model(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    cls = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = cls(**arguments).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def save_folder(folder: Path, config: dict[str, Any], model: Any) -> None:
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    whole = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


@pytest.mark.parametrize(
    ("vision", "quick_gelu"),
    [
        (VISION, False),
        (VISION, True),
        ({**VISION, "ls_init_value": 0.1, "no_ln_pre": True}, False),
        ({**VISION, "pool_type": "avg", "final_ln_after_pool": True}, False),
        (TIMM, False),
        (SIGLIP, False),
    ],
)
def test_a_folder_gives_open_clips_own_output(
    vision: dict[str, Any], quick_gelu: bool, tmp_path: Path
) -> None:
    config = build_config(vision, quick_gelu)
    model = build_model(config)
    save_folder(tmp_path, config, model)
    teacher = load_teacher(str(tmp_path))
    images = torch.randn(2, 3, *teacher.spec.image_size)
    output = teacher(images, at_block=1)
    torch.testing.assert_close(output.pooled, model.encode_image(images), rtol=0, atol=1e-5)
    tokens = output.mid
    if teacher.spec.has_cls:
        tokens = torch.cat([output.mid_cls[:, None], output.mid], dim=1)
    normed, pooled = teacher.run_from(tokens, 1)
    torch.testing.assert_close(pooled, output.pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(normed[:, teacher.spec.num_prefix :], output.tokens, rtol=0, atol=1e-5)
    activation = "gelu_tanh" if vision is SIGLIP else "quick_gelu" if quick_gelu else "gelu"
    assert teacher.spec.activation == activation
    transform = teacher.spec.transform
    assert (transform.mean, transform.resize) == ((0.1, 0.2, 0.3), "squash")
    texts = ["a red circle", "two dogs"]
    assert teacher.has_text
    numbers = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
    torch.testing.assert_close(teacher.encode_text(texts), model.encode_text(numbers), rtol=0, atol=1e-5)
    assert teacher.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()), rel=1e-6)


def test_final_patch_tokens_are_open_clips() -> None:
    model = build_model(build_config(VISION))
    model.visual.output_tokens = True
    images = torch.randn(2, 3, 32, 32)
    _, tokens = model.visual(images)
    model.visual.output_tokens = False
    output = Teacher(build_open_clip_trunk(model, "open_clip:test"))(images)
    torch.testing.assert_close(output.tokens, tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", [TIMM, SIGLIP])
def test_a_timm_trunk_is_inherited(vision: dict[str, Any]) -> None:
    teacher = Teacher(build_open_clip_trunk(build_model(build_config(vision)), "open_clip:test"))
    narrow = {"stem_channels": 8, "mixing_points": 4, "num_points": 4, "focusing_repeats": 1}
    depth = teacher.spec.depth
    encoder = SparseFormer(spec_to_config(teacher.spec, 1, **narrow), teacher.spec.transform)
    report = inherit_teacher(encoder, teacher, InheritPlan.thirds(depth, drop=1))
    tokens = torch.randn(2, 5, teacher.spec.width)
    expected = teacher.trunk.run_block(1, tokens)
    torch.testing.assert_close(encoder.cortex.blocks[0](tokens), expected, rtol=0, atol=1e-5)
    last = "visual.trunk.attn_pool.latent" if vision is SIGLIP else "visual.head.proj.weight"
    assert last in {row.source for row in report.tensors if row.target}
    tokens, pooled = teacher.run_from(tokens, depth)
    assert pooled.shape == (2, teacher.spec.embedding_width)


def test_a_name_with_a_file_loads_offline(tmp_path: Path) -> None:
    (tmp_path / "tiny-test-vit.json").write_text(json.dumps(build_config(VISION)))
    open_clip.add_model_config(tmp_path / "tiny-test-vit.json")
    model = build_model(build_config(VISION))
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, file)
    teacher = load_teacher("open_clip:tiny-test-vit", file)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images).pooled, model.encode_image(images), rtol=0, atol=1e-5)
    torch.save({"other": torch.zeros(1)}, file)
    with pytest.raises(TeacherError, match="open_clip cannot load it"):
        load_teacher("open_clip:tiny-test-vit", file)


@pytest.mark.parametrize(
    ("model_name", "mean", "resize", "warned"),
    [
        ("ViT-B-16-SigLIP", 0.5, "squash", None),
        ("ViT-L-14-CLIPA", 0.485, "squash", None),
        (
            "ViT-B-32",
            0.48145466,
            "shortest",
            "computes GELU; OpenAI.* of open_clip:ViT-B-32-quickgelu",
        ),
        ("ViT-B-32-quickgelu", 0.48145466, "shortest", None),
        ("ViT-L-14", 0.48145466, "shortest", r"prepared in 2 ways; these get them as most do, .*0\.481"),
    ],
)
def test_a_file_has_pictures_prepared_as_what_was_published(
    model_name: str,
    mean: float,
    resize: str,
    warned: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: dict[str, Any] = {}

    def create(model_name: str, **options: Any) -> Any:
        asked.update(options["force_preprocess_cfg"])
        return build_model(build_config(VISION))

    monkeypatch.setattr(open_clip_load.open_clip, "create_model", create)
    (tmp_path / "weights.pt").touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_teacher(f"open_clip:{model_name}", tmp_path / "weights.pt")
    assert (asked["mean"][0], asked["resize_mode"]) == (mean, resize)
    ours = [str(each.message) for each in said if "teacher 'open_clip:" in str(each.message)]
    assert bool(ours) == (warned is not None)
    assert warned is None or any(re.search(warned, text) for text in ours)


def test_a_tag_knows_its_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def create(model_name: str, **options: Any) -> Any:
        asked[model_name] = options
        return build_model(build_config(VISION, options["force_quick_gelu"]))

    monkeypatch.setattr(open_clip_load.open_clip, "create_model", create)
    teacher = load_teacher("open_clip:ViT-B-32/openai")
    assert asked["ViT-B-32"]["force_quick_gelu"] is True
    assert teacher.spec.activation == "quick_gelu"
    load_teacher("open_clip:ViT-B-32/laion2b_e16")
    assert asked["ViT-B-32"]["force_quick_gelu"] is False
    monkeypatch.setattr(
        open_clip_load.open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": False, "u": 1}
    )
    with pytest.raises(TeacherError, match="trained with GELU: write open_clip:ViT-B-32/tag"):
        load_teacher("open_clip:ViT-B-32-quickgelu/tag")


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({**VISION, "layers": [1, 1, 1, 1], "width": 8}, "ModifiedResNet, not a plain ViT"),
        ({**VISION, "qk_norm": True}, "not a plain ViT block"),
        ({**VISION, "scale_fc": True}, "not a plain ViT block"),
        ({**VISION, "attentional_pool": True, "attn_pooler_heads": 2}, "CoCa's attention pooler"),
        ({**VISION, "pool_type": "avg"}, "averages normed tokens"),
        ({"image_size": 64, "timm_model_name": "resnet18", "timm_pool": "", "timm_proj": "linear"}, "ResNet"),
        ({**TIMM, "timm_proj": "mlp"}, "not one linear projection"),
    ],
)
def test_what_cannot_be_inherited_is_refused_with_the_reason(vision: dict[str, Any], words: str) -> None:
    model = build_model(build_config(vision))
    with pytest.raises(TeacherError, match=words):
        build_open_clip_trunk(model, "open_clip:test")


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    config = build_config(VISION)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(TeacherError, match="has no 'model_cfg'"):
        load_teacher(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(TeacherError, match="has no weights"):
        load_teacher(str(tmp_path))
    save_file({"conv.weight": torch.zeros(2, 2)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(TeacherError, match=r"open_clip cannot load it: .* Missing key") as refused:
        load_teacher(str(tmp_path))
    assert len(str(refused.value)) < 1000  # torch names every tensor
    hub = {**config, "text_cfg": {**TEXT, "hf_model_name": "owner/text"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": hub}))
    with pytest.raises(TeacherError, match="text side is built from the hub's 'owner/text'"):
        load_teacher(str(tmp_path))


def test_a_tokenizer_that_only_a_hub_has_is_not_fetched(tmp_path: Path) -> None:
    config = build_config(VISION)
    model = build_model(config)
    config["text_cfg"] = {**TEXT, "hf_tokenizer_name": "owner/tokenizer"}
    save_folder(tmp_path, config, model)
    teacher = load_teacher(str(tmp_path))
    assert not teacher.has_text
    with pytest.raises(TeacherError, match="no text side"):
        teacher.encode_text(["a cat"])
