"""timm teachers: outputs equal timm's, folders and files load, what cannot be inherited is refused."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

timm = pytest.importorskip("timm")

from safetensors.torch import save_file  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)

from bootstrap.teacher import (  # noqa: E402
    Teacher,
    TeacherError,
    inherit_teacher,
    load_teacher,
    spec_to_config,
)
from bootstrap.teachers.timm_vit import TimmTrunk  # noqa: E402
from sparse_vlm import SparseFormer, TransformConfig  # noqa: E402
from sparse_vlm.inherit import InheritPlan  # noqa: E402

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
FAMILIES: dict[str, dict[str, Any]] = {
    "augreg": {},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", "num_classes": 0},
    "dinov2": {"init_values": 0.1, "num_classes": 0},
    "registers": {"init_values": 0.1, "reg_tokens": 4, "num_classes": 0},
    "attention_with_class_token": {"global_pool": "map"},
    "average": {"global_pool": "avg"},
    "average_without_class_token": {"global_pool": "avg", "class_token": False},
    "dynamic": {"dynamic_img_size": True},
}


def build_model(cls: type = VisionTransformer, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = cls(**{**TINY, **changes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_timms_own(family: str) -> None:
    model = build_model(**FAMILIES[family])
    teacher = Teacher(TimmTrunk(model, "timm:test"))
    images = torch.randn(2, 3, 32, 32)
    output = teacher(images, at_block=1)
    torch.testing.assert_close(output.pooled, model(images), rtol=0, atol=1e-5)
    features = model.forward_features(images)
    if model.global_pool == "avg":
        features = model.fc_norm(features)
    prefix = teacher.spec.num_prefix
    torch.testing.assert_close(output.tokens, features[:, prefix:], rtol=0, atol=1e-5)
    after_first = model.forward_intermediates(images, indices=[0], intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(output.mid, after_first[0], rtol=0, atol=1e-5)
    assert (output.cls is not None) == teacher.spec.has_cls == (output.mid_cls is not None)
    assert output.pooled.shape == (2, teacher.spec.embedding_width)
    assert teacher.spec.num_registers == FAMILIES[family].get("reg_tokens", 0)


def test_transform_is_timms_own() -> None:
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=False)
    transform = Teacher(TimmTrunk(model, "timm:test")).spec.transform
    data = timm.data.resolve_model_data_config(model)
    assert transform.mean == tuple(data["mean"]) == (0.5, 0.5, 0.5)
    assert transform.interpolation == data["interpolation"] == "bicubic"
    assert (transform.height, transform.resized_at_least[0]) == (224, int(224 / data["crop_pct"]))


@pytest.mark.parametrize("pooling", ["token", "map", "avg"])
def test_an_inherited_cortex_pools_as_its_teacher(pooling: str) -> None:
    teacher = Teacher(TimmTrunk(build_model(global_pool=pooling, num_classes=0), "timm:test"))
    narrow = {"stem_channels": 8, "mixing_points": 4, "num_points": 4, "focusing_repeats": 1}
    encoder = SparseFormer(spec_to_config(teacher.spec, 1, **narrow), teacher.spec.transform)
    inherit_teacher(encoder, teacher, InheritPlan.thirds(3, drop=1))
    tokens = torch.randn(2, 6, 32)
    states = tokens
    for block in encoder.cortex.blocks:
        states = block(states)
    torch.testing.assert_close(encoder.head(states)[1], teacher.run_from(tokens, 1)[1], rtol=0, atol=1e-5)


def test_clips_projection_is_no_classifier() -> None:
    clip = {"pre_norm": True, "act_layer": "quick_gelu"}
    for architecture, biased, names in (
        ("vit_base_patch16_clip_224", False, False),
        ("vit_base_patch16_clip_224", True, True),  # tuned to classify
        ("vit_base_patch16_224", False, True),
    ):
        model = build_model(**clip)
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "architecture": architecture}
        if not biased:
            model.head.bias.data.zero_()
        transform = TransformConfig(image_size=32)
        assert TimmTrunk(model, "timm:test", transform).spec.names_classes == names


@pytest.mark.parametrize("registers", [False, True])
def test_run_from_takes_no_registers(registers: bool) -> None:
    model = build_model(reg_tokens=4 if registers else 0)
    teacher = Teacher(TimmTrunk(model, "timm:test"))
    tokens = torch.randn(2, 6, 32)
    normed, pooled = teacher.run_from(tokens, 1)
    expected = model.norm(model.blocks[2](model.blocks[1](tokens)))
    torch.testing.assert_close(normed, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, model.head(expected[:, 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, "block 0 normalises queries and keys"),
        ({"scale_attn_norm": True}, "block 0 normalises its attention's output"),
        ({"scale_mlp_norm": True}, "block 0 normalises inside its MLP"),
        ({"mlp_layer": timm.layers.SwiGLU}, r"block 0 has a SwiGLU \(gated MLP\)"),
        ({"mlp_layer": timm.layers.SwiGLUPacked}, r"block 0 has a .* \(gated MLP\)"),
        (
            {"block_fn": ResPostBlock, "init_values": None},
            "ResPostBlock, which norms its branches at their end",
        ),
        ({"block_fn": ParallelScalingBlock}, "runs attention and MLP in parallel"),
        ({"block_fn": ParallelThingsBlock}, "runs several attentions and MLPs in parallel"),
        ({"act_layer": "relu"}, "is none of gelu"),
        ({"norm_layer": "rmsnorm"}, "not a layer norm with weight and bias"),
        ({"global_pool": "max"}, "global_pool='max' is none of"),
        ({"global_pool": "avg", "fc_norm": False}, "averages normed tokens"),
        ({"fc_norm": True, "final_norm": False}, "no norm after its last block"),
        ({"proj_bias": False}, "no output bias"),
    ],
)
def test_what_cannot_be_inherited_is_refused_with_the_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TeacherError, match=words) as caught:
        TimmTrunk(build_model(**changes), "timm:test")
    assert "\n" not in str(caught.value)


def test_other_networks_are_refused() -> None:
    for name, words in (
        ("resnet18", "ResNet is not a plain ViT"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer is not a plain ViT"),
        ("eva02_tiny_patch14_224", "Eva uses rotary position embeddings"),
    ):
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        with pytest.raises(TeacherError, match=words):
            TimmTrunk(model, f"timm:{name}")
    with pytest.raises(TeacherError, match="VisionTransformerDistilled adds to"):
        TimmTrunk(build_model(VisionTransformerDistilled), "timm:test")


def save_hub_layout(folder: Path, model: Any, args: dict[str, Any]) -> None:
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 7,
        "pretrained_cfg": {
            "input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
            "interpolation": "bilinear", "crop_pct": 1.0, "fixed_input_size": True,
        },
        "model_args": args,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")


def test_a_folder_in_hub_layout_loads_offline(tmp_path: Path) -> None:
    model = build_model()
    args = {key: TINY[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    save_hub_layout(tmp_path, model, args)
    teacher = load_teacher(str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images).pooled, model(images), rtol=0, atol=1e-5)
    assert teacher.spec.transform.mean == (0.1, 0.2, 0.3)
    assert teacher.spec.transform.interpolation == "bilinear"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"has no weights: expected one of model\.safetensors"):
        load_teacher(str(tmp_path))


def test_a_name_with_a_file_loads_offline(tmp_path: Path) -> None:
    name = "test_vit"  # timm's own miniature
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5).eval()
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.half() for key, tensor in model.state_dict().items()}, file)
    teacher = load_teacher(f"timm:{name}", file)
    assert teacher.spec.output_width == 5
    assert teacher.dtype == torch.float32
    images = torch.randn(1, 3, *teacher.spec.image_size)
    torch.testing.assert_close(teacher(images).pooled, model(images), rtol=0, atol=1e-2)
    assert load_teacher(f"timm:{name}", tmp_path).spec.output_width == 5
    with pytest.raises(TeacherError, match="does not say which model it belongs to"):
        load_teacher(str(file))
    save_file(model.state_dict(), file, metadata={"timm": name})
    for place in (file, tmp_path):
        torch.testing.assert_close(load_teacher(str(place))(images).pooled, model(images))


@pytest.mark.parametrize(
    ("name", "mean", "warned"),
    [
        (
            "vit_base_patch16_224",
            0.5,
            r"'mean': \(0\.5, .* bamboo, dino, mae are .*timm:vit_base_patch16_224\.TAG",
        ),
        ("vit_base_patch16_224.mae", 0.485, None),
        ("vit_large_patch14_clip_224", 0.5, "openai, .* are prepared otherwise"),
        ("vit_large_patch14_clip_224.openai", 0.48145466, None),
        ("vit_tiny_patch16_224", 0.5, None),
    ],
)
def test_a_file_whose_pictures_may_be_prepared_otherwise_is_said(
    name: str, mean: float, warned: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(
        timm, "create_model", lambda *names, **options: create(*names, **{**options, **small})
    )
    file = tmp_path / "model.safetensors"
    save_file(timm.create_model(name, pretrained=False, num_classes=0).state_dict(), file)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_teacher(f"timm:{name}", file).spec.transform.mean[0] == mean
    ours = [str(each.message) for each in said if "teacher 'timm:" in str(each.message)]
    assert len(ours) == (warned is not None)
    assert warned is None or re.search(warned, ours[0])


class _Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": _Evil(tmp_path / "harm")}, tmp_path / "evil.pth")
    with pytest.raises(TeacherError, match=r"evil\.pth cannot be read as a checkpoint"):
        load_teacher("timm:vit_tiny_patch16_224", tmp_path / "evil.pth")
    assert not (tmp_path / "harm").exists()


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"conv.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(TeacherError, match="holds the weights of another model"):
        load_teacher("timm:test_vit", file)
    save_file(timm.create_model("test_vit", pretrained=False, embed_dim=32).state_dict(), file)
    with pytest.raises(TeacherError, match=r"size mismatch for .* more lines") as refused:
        load_teacher("timm:test_vit", file)
    assert "\n" not in str(refused.value)  # torch has a line for every tensor
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(TeacherError, match="cannot be read as a checkpoint"):
        load_teacher("timm:test_vit", file)
    with pytest.raises(TeacherError, match="not a readable safetensors file"):
        load_teacher(str(file))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="not readable JSON"):
        load_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"neither timm's .* nor transformers'"):
        load_teacher(str(tmp_path))
    (tmp_path / "config.json").unlink()
    file.unlink()
    with pytest.raises(TeacherError, match="holds no teacher"):
        load_teacher(str(tmp_path))


def test_the_projection_of_a_clip_names_no_classes() -> None:
    clip = timm.create_model("vit_base_patch32_clip_224", pretrained=False, depth=1, num_classes=512)
    assert not Teacher(TimmTrunk(clip, "timm:clip")).spec.names_classes
    torch.nn.init.normal_(clip.head.bias)  # tuned to a classifier
    assert Teacher(TimmTrunk(clip, "timm:tuned")).spec.names_classes
    assert Teacher(TimmTrunk(build_model(), "timm:test")).spec.names_classes
    assert not Teacher(TimmTrunk(build_model(num_classes=0), "timm:test")).spec.names_classes


def test_pictures_have_the_size_that_the_model_takes(tmp_path: Path) -> None:
    model = build_model(img_size=48)
    args = {key: TINY[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    save_hub_layout(tmp_path, model, {**args, "img_size": 48})  # the configuration says 32
    teacher = load_teacher(str(tmp_path))
    assert (teacher.spec.image_size, teacher.spec.transform.image_size) == ((48, 48), 48)
    assert teacher.spec.transform.mean == (0.1, 0.2, 0.3)
