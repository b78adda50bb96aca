"""transformers teachers: outputs equal transformers', folders load offline, the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from bootstrap.teacher import TeacherError, hash_teacher, load_teacher  # noqa: E402
from bootstrap.teachers.hf_vit import HfTrunk  # noqa: E402
from sparse_vlm.fingerprint import hash_tower  # noqa: E402
from sparse_vlm.transform import TransformConfig  # noqa: E402

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PLAIN = {**SHAPE, "intermediate_size": 48}
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CLIP_PICTURES = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 36}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
}  # fmt: skip
OTHER_PICTURES = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], dict[str, Any]]] = {
    "CLIPVisionModel": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PLAIN, hidden_act="gelu")),
        lambda model, images: model(images).pooler_output,
        CLIP_PICTURES,
    ),
    "CLIPVisionModelWithProjection": (
        lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**PLAIN, projection_dim=24)
        ),
        lambda model, images: model(images).image_embeds,
        CLIP_PICTURES,
    ),
    "CLIPModel": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=PLAIN, text_config=TEXT, projection_dim=24)
        ),
        lambda model, images: model.get_image_features(images).pooler_output,
        CLIP_PICTURES,
    ),
    "SiglipVisionModel": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PLAIN)),
        lambda model, images: model(images).pooler_output,
        OTHER_PICTURES,
    ),
    "SiglipModel": (
        lambda: transformers.SiglipModel(transformers.SiglipConfig(vision_config=PLAIN, text_config=TEXT)),
        lambda model, images: model.get_image_features(images).pooler_output,
        OTHER_PICTURES,
    ),
    "Dinov2Model": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**{**SHAPE, "image_size": 48})),
        lambda model, images: model(images).pooler_output,
        CLIP_PICTURES,
    ),
    "Dinov2WithRegistersModel": (
        lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SHAPE)),
        lambda model, images: model(images).pooler_output,
        CLIP_PICTURES,
    ),
    "ViTModel": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**PLAIN)),
        lambda model, images: model(images).last_hidden_state[:, 0],
        OTHER_PICTURES,
    ),
    "ViTForImageClassification": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**PLAIN, num_labels=7)),
        lambda model, images: model(images).logits,
        OTHER_PICTURES,
    ),
}


def save_model(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    build, _, pictures = MODELS[kind]
    model = build().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_gives_transformers_own_output(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    teacher = load_teacher(str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    output = teacher(images, at_block=1)
    torch.testing.assert_close(output.pooled, MODELS[kind][1](model, images), rtol=0, atol=1e-5)
    assert output.tokens.shape == output.mid.shape == (2, 16, 32)
    assert teacher.spec.embedding_width == output.pooled.shape[1]
    if teacher.spec.num_registers:
        return  # the tail below runs without them
    tokens = output.mid
    if teacher.spec.has_cls:
        tokens = torch.cat([output.mid_cls[:, None], output.mid], dim=1)
    normed, pooled = teacher.run_from(tokens, 1)
    torch.testing.assert_close(pooled, output.pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(normed[:, teacher.spec.num_prefix :], output.tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_a_classifier_of_pictures_gives_its_tower(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vision_config=PLAIN, text_config=TEXT, num_labels=5)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_PICTURES))
    images = torch.randn(2, 3, 32, 32)
    teacher = load_teacher(str(tmp_path))
    seen = model.vision_model(images)
    torch.testing.assert_close(teacher(images).pooled, seen.pooler_output, rtol=0, atol=1e-5)
    assert not teacher.has_text


def test_a_run_knows_its_teacher_by_the_projection_too(tmp_path: Path) -> None:
    save_model(tmp_path, "CLIPVisionModelWithProjection")
    weights = load_teacher(str(tmp_path)).vision_state_dict()
    other = {**weights, "visual_projection.weight": weights["visual_projection.weight"] + 1}
    assert hash_tower(weights) == hash_tower(other)
    assert hash_teacher(weights) != hash_teacher(other)
    bare = {name: tensor for name, tensor in weights.items() if "visual_projection" not in name}
    assert hash_teacher(bare) == hash_tower(bare)


def test_spec_says_what_the_model_is(tmp_path: Path) -> None:
    save_model(tmp_path, "CLIPModel")
    spec = load_teacher(f"hf:{tmp_path}").spec
    assert (spec.library, spec.activation, spec.pre_norm, spec.output_width) == (
        "transformers", "quick_gelu", True, 24,
    )  # fmt: skip
    assert spec.transform == TransformConfig(
        image_size=32, resize_size=36, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    save_model(tmp_path, "Dinov2WithRegistersModel")
    spec = load_teacher(str(tmp_path)).spec
    assert (spec.num_registers, spec.layer_scale, spec.head_bias, spec.grid) == (4, True, False, (4, 4))
    save_model(tmp_path, "SiglipVisionModel")
    spec = load_teacher(str(tmp_path)).spec
    assert (spec.activation, spec.pooling, spec.has_cls) == ("gelu_tanh", "attention", False)
    assert (spec.transform.resize, spec.transform.interpolation) == ("squash", "bilinear")


def test_text_needs_tokenizer_files(tmp_path: Path) -> None:
    save_model(tmp_path, "CLIPModel")
    teacher = load_teacher(str(tmp_path))
    assert not teacher.has_text
    with pytest.raises(TeacherError, match="no tokenizer files"):
        teacher.encode_text(["a cat"])
    save_model(tmp_path, "CLIPVisionModel")
    with pytest.raises(TeacherError, match="no text side"):
        load_teacher(str(tmp_path)).encode_text(["a cat"])


def save_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "a": 4, "cat": 5, "dog": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_text_embeddings_are_transformers_own(kind: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, kind)
    tokenizer = save_tokenizer(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.has_text
    texts = ["a cat", "a dog a dog a dog a dog a dog"]
    padding = "max_length" if kind == "SiglipModel" else True
    numbers = tokenizer(texts, padding=padding, truncation=True, max_length=8, return_tensors="pt")
    numbers.pop("token_type_ids", None)
    assert "attention_mask" in numbers
    if kind == "SiglipModel":
        del numbers["attention_mask"]  # its padding is read, in training as by published tokenizers
    expected = model.get_text_features(**numbers).pooler_output
    torch.testing.assert_close(teacher.encode_text(texts), expected, rtol=0, atol=1e-5)
    assert teacher.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()), rel=1e-6)


def test_what_cannot_be_inherited_is_refused_with_the_reason(tmp_path: Path) -> None:
    swiglu = transformers.Dinov2Config(**SHAPE, use_swiglu_ffn=True, architectures=["Dinov2Model"])
    swiglu.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="SwiGLU"):
        load_teacher(str(tmp_path))
    transformers.SwinConfig().save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="model type 'swin' is none of"):
        load_teacher(str(tmp_path))
    with pytest.raises(TeacherError, match="Linear is none of transformers' plain ViTs"):
        HfTrunk(torch.nn.Linear(1, 1), "hf:test", TransformConfig())
    relu = transformers.ViTModel(transformers.ViTConfig(**PLAIN, hidden_act="relu"))
    with pytest.raises(TeacherError, match="is none of gelu"):
        HfTrunk(relu, "hf:test", TransformConfig(image_size=32))
    headless = transformers.SiglipVisionConfig(**PLAIN, vision_use_head=False)
    with pytest.raises(TeacherError, match="no pooling head"):
        HfTrunk(transformers.SiglipVisionModel(headless), "hf:test", TransformConfig(image_size=32))


def test_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path, "CLIPVisionModel")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(TeacherError, match=r"no preprocessor_config\.json"):
        load_teacher(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**CLIP_PICTURES, "resample": 0}))
    with pytest.raises(TeacherError, match="resample must be"):
        load_teacher(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP_PICTURES))
    from safetensors.torch import save_file

    tensors = model.state_dict()
    del tensors["post_layernorm.bias"]
    save_file(
        {**tensors, "stranger": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        TeacherError, match=r"lack 1 tensors \(post_layernorm\.bias\).*unknown ones \(stranger\)"
    ):
        load_teacher(str(tmp_path))
    few = {name: tensor for name, tensor in tensors.items() if name.startswith("embeddings.")}
    save_file(few, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"lack \d+ tensors \(.* and \d+ more\)") as refused:
        load_teacher(str(tmp_path))
    assert len(str(refused.value)) < 600
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="cannot load its weights"):
        load_teacher(str(tmp_path))
