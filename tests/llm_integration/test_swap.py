"""The tower of an existing LLaVA, exchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import sparse_vlm
from llm_integration.assemble import OWNED, assemble
from llm_integration.clip_vision import load_clip_vision
from llm_integration.data.encode import ChatEncoder
from llm_integration.load import load_checked_processor, load_llava
from llm_integration.processor import load_processor, pads_pictures
from llm_integration.swap import holds_tower, main, swap
from sparse_vlm import SparseFormerConfig, TransformConfig
from sparse_vlm.fingerprint import hash_tower

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "scenes_clip"


@pytest.fixture(scope="module")
def clip_llava(
    tmp_path_factory: pytest.TempPathFactory, build_llm_dir: Callable[..., Path]
) -> tuple[Path, Path]:
    """A LLaVA in LLaVA 1.5's manner, and the CLIP tower inside it as a directory of its own."""
    root = tmp_path_factory.mktemp("clip_llava")
    tokenizer = AutoTokenizer.from_pretrained(build_llm_dir("llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=len(tokenizer) - 1)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(root / "llava")
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{{ messages }}",
    ).save_pretrained(root / "llava")
    tower: Any = model.model.vision_tower
    assert isinstance(tower, CLIPVisionModel)
    tower.save_pretrained(root / "clip")
    return root / "llava", root / "clip"


def _encoder(config: SparseFormerConfig, directory: Path, teacher: Any) -> Path:
    sparse_vlm.build_encoder(config, TransformConfig(image_size=32)).save(directory, {"teacher": teacher})
    return directory


def _read_layer(llava: Path, layer: Any, directory: Path) -> None:
    """A copy of a LLaVA whose projector reads another state of its tower."""
    shutil.copytree(llava, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vision_feature_layer": layer}))


def test_a_stranger_gets_a_new_projector(
    clip_llava: tuple[Path, Path], encoder_dir: Path, tmp_path: Path
) -> None:
    before = load_llava(clip_llava[0])
    said = swap(clip_llava[0], encoder_dir, tmp_path / "out")
    assert said.startswith("projector re-initialised")
    model = load_llava(tmp_path / "out")
    processor = load_checked_processor(tmp_path / "out", model.config)
    assert model.config.vision_feature_layer == -1
    assert not torch.equal(
        model.model.multi_modal_projector.linear_1.weight, before.model.multi_modal_projector.linear_1.weight
    )
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    inputs = processor(images=Image.new("RGB", (70, 20)), text="<image>\nwhat", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 9
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_llava_that_pads_its_pictures_goes_on_padding(
    clip_llava: tuple[Path, Path], encoder_dir: Path, tmp_path: Path
) -> None:
    stock = shutil.copytree(clip_llava[0], tmp_path / "stock")
    settings = json.loads((stock / "processor_config.json").read_text())
    settings["image_processor"] |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    (stock / "processor_config.json").write_text(json.dumps(settings))
    swap(stock, encoder_dir, tmp_path / "padding")
    swap(clip_llava[0], encoder_dir, tmp_path / "cropping")
    assert pads_pictures(load_processor(tmp_path / "padding"))
    assert not pads_pictures(load_processor(tmp_path / "cropping"))


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "user: <image>\nWhat?\n"),
        (
            "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
            "{{ '<image> ' if c.type == 'image' else c.text }}{% endfor %}; {% endfor %}",
            "user: <image> What?; ",
        ),
        (None, "USER: <image>\nWhat? "),
    ],
    ids=["text", "parts", "none"],
)
def test_any_template_of_the_stock_model_serves_pictures_and_tuning(
    own: str | None, asked: str, clip_llava: tuple[Path, Path], encoder_dir: Path, tmp_path: Path
) -> None:
    stock: Any = load_processor(clip_llava[0])
    shutil.copytree(clip_llava[0], tmp_path / "llava")
    (tmp_path / "llava" / "chat_template.jinja").unlink(missing_ok=True)
    stock.chat_template = stock.tokenizer.chat_template = own
    stock.save_pretrained(tmp_path / "llava")
    swap(tmp_path / "llava", encoder_dir, tmp_path / "out")
    processor: Any = load_processor(tmp_path / "out")
    for content in ("<image>\nWhat?", [{"type": "image"}, {"type": "text", "text": "What?"}]):
        question = {"role": "user", "content": content}
        text = processor.apply_chat_template([question], tokenize=False)
        assert text.endswith(asked)
        assert text.count("<image>") == 1
    encoder = ChatEncoder(processor.tokenizer, processor.chat_template, 9, 4096)
    answered = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a dog"}]
    assert encoder.encode(answered).labels[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("form", ["name", "hash"])
def test_the_towers_own_child_keeps_the_projector(
    clip_llava: tuple[Path, Path], tiny_encoder_config: SparseFormerConfig, tmp_path: Path, form: str
) -> None:
    llava, clip = clip_llava
    before = load_llava(llava)
    digest = hash_tower(before.model.vision_tower.state_dict())
    teacher = f"hf:{clip}" if form == "name" else {"name": "hf:gone", "tower_sha256": digest}
    said = swap(llava, _encoder(tiny_encoder_config, tmp_path / "enc", teacher), tmp_path / "out")
    assert said.startswith("projector kept, reading layer -2")
    model = load_llava(tmp_path / "out")
    assert torch.equal(
        model.model.multi_modal_projector.linear_1.weight, before.model.multi_modal_projector.linear_1.weight
    )
    processor = load_checked_processor(tmp_path / "out", model.config)
    inputs = processor(images=Image.new("RGB", (70, 20)), text="<image>\nwhat", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 8
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize(("layer", "wanted"), [(-2, -2), ([2], [-2]), (1, -3), (0, None)])
def test_a_kept_projector_reads_the_same_layer_of_a_shorter_tower(
    clip_llava: tuple[Path, Path],
    tiny_encoder_config: SparseFormerConfig,
    tmp_path: Path,
    layer: Any,
    wanted: Any,
) -> None:
    """The ViT has three blocks, the cortex its last two: the ViT's state 0 is nowhere in it."""
    llava, clip = clip_llava
    _read_layer(llava, layer, tmp_path / "llava")
    encoder = _encoder(tiny_encoder_config, tmp_path / "enc", f"hf:{clip}")
    if wanted is None:
        with pytest.raises(ValueError, match="reads hidden state 0 of its tower of 3 blocks"):
            swap(tmp_path / "llava", encoder, tmp_path / "out")
        return
    swap(tmp_path / "llava", encoder, tmp_path / "out")
    assert load_llava(tmp_path / "out").config.vision_feature_layer == wanted


@pytest.mark.parametrize("layer", [-1, 3, [-1]])
def test_a_projector_that_reads_the_state_before_the_final_norm_starts_anew(
    clip_llava: tuple[Path, Path], tiny_encoder_config: SparseFormerConfig, tmp_path: Path, layer: Any
) -> None:
    """CLIP in transformers gives its last state before its final norm, an encoder of ours after it."""
    llava, clip = clip_llava
    _read_layer(llava, layer, tmp_path / "llava")
    encoder = _encoder(tiny_encoder_config, tmp_path / "enc", f"hf:{clip}")
    said = swap(tmp_path / "llava", encoder, tmp_path / "out")
    assert said.startswith("projector re-initialised")
    assert "before the final norm" in said
    assert load_llava(tmp_path / "out").config.vision_feature_layer == -1


def test_a_teacher_in_open_clips_format_is_recognised() -> None:
    tower = load_clip_vision(SHIPPED)[0].state_dict()
    assert holds_tower(SHIPPED, tower)
    name = next(name for name in tower if name.endswith("q_proj.weight"))
    assert not holds_tower(SHIPPED, {**tower, name: tower[name] + 1})


def test_a_teacher_that_cannot_be_compared_is_no_parent(
    clip_llava: tuple[Path, Path], tiny_encoder_config: SparseFormerConfig, tmp_path: Path
) -> None:
    teacher = tmp_path / "other"
    shutil.copytree(SHIPPED, teacher)
    path = teacher / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["vision_cfg"]["attentional_pool"] = True
    path.write_text(json.dumps(content))
    encoder = _encoder(tiny_encoder_config, tmp_path / "enc", str(teacher))
    assert "cannot be compared with this tower" in swap(clip_llava[0], encoder, tmp_path / "out")


def test_a_stock_processor_gets_what_tuning_needs_or_is_refused(
    clip_llava: tuple[Path, Path], encoder_dir: Path, tmp_path: Path
) -> None:
    llava = shutil.copytree(clip_llava[0], tmp_path / "llava")
    processor: Any = load_processor(llava)
    processor.tokenizer.pad_token = None
    processor.save_pretrained(llava)
    swap(llava, encoder_dir, tmp_path / "out")
    swapped: Any = load_processor(tmp_path / "out")
    assert swapped.tokenizer.pad_token_id is not None
    processor.image_token = "[IMG]"
    processor.save_pretrained(llava)
    with pytest.raises(ValueError, match=r"marks pictures with '\[IMG\]'; .* have <image> for it"):
        swap(llava, encoder_dir, tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "config.json",
            '{"model_type": "llava_llama", "mm_vision_tower": "x"}',
            "format of the llava package",
        ),
        ("config.json", '{"model_type": "llava", "mm_vision_tower": "x"}', "format of the llava package"),
        ("config.json", '{"model_type": "phi9"}', "holds a 'phi9' model, which this transformers does not"),
        ("run.json", "{}", r"is the result of a run; .*llm_integration\.export --run"),
    ],
)
def test_models_of_other_kinds_are_named(
    name: str, text: str, message: str, encoder_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        swap(tmp_path / "llava", encoder_dir, tmp_path / "out")
    if name == "config.json":
        with pytest.raises(ValueError, match=message):
            assemble(encoder_dir, str(tmp_path / "llava"), tmp_path / "out")


def test_what_the_copy_is_made_of_is_not_replaced(
    clip_llava: tuple[Path, Path], encoder_dir: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in clip_llava[0].iterdir())
    with pytest.raises(ValueError, match="is what the model is made of"):
        swap(clip_llava[0], encoder_dir, clip_llava[0])
    with pytest.raises(FileExistsError, match="holds no model of ours"):
        swap(clip_llava[0], encoder_dir, clip_llava[1])
    assert sorted(path.name for path in clip_llava[0].iterdir()) == before
    for _ in range(2):  # an earlier copy of ours is replaced
        swap(clip_llava[0], encoder_dir, tmp_path / "out")


def test_a_teacher_with_other_weights_is_no_parent(
    clip_llava: tuple[Path, Path], tiny_encoder_config: SparseFormerConfig, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    CLIPVisionModel(load_llava(clip_llava[0]).config.vision_config).save_pretrained(tmp_path / "other")
    encoder = _encoder(tiny_encoder_config, tmp_path / "enc", str(tmp_path / "other"))
    assert "has other weights" in swap(clip_llava[0], encoder, tmp_path / "out")


def test_width_that_does_not_fit_the_projector_is_named(llava_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_dir, tmp_path / "bent")
    path = tmp_path / "bent" / "config.json"
    values = json.loads(path.read_text())
    values["vision_config"]["architecture"].update(width=64)
    path.write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match="projector reads tokens of width 32, the encoder's tokens have width 64"
    ):
        load_llava(tmp_path / "bent")


def test_a_tower_without_weights_is_an_error(llava_dir: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(llava_dir, tmp_path / "bare")
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "vision_tower" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights of the vision tower were not found"):
        load_llava(tmp_path / "bare")


def test_a_llava_with_weights_missing_is_not_swapped(
    clip_llava: tuple[Path, Path], encoder_dir: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_llava[0], tmp_path / "bare")
    weights = load_file(tmp_path / "bare" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(kept, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing"):
        swap(tmp_path / "bare", encoder_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_line_says_what_it_did(
    clip_llava: tuple[Path, Path], encoder_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    words = ["--llava", str(clip_llava[0]), "--encoder", str(encoder_dir), "--out", str(tmp_path / "out")]
    main(words)
    said = capsys.readouterr()
    assert "projector re-initialised" in said.out
    assert "warning: " not in said.err
    main([*words, "--num-tokens", "16"])
    assert f"warning: {encoder_dir} was bootstrapped with 9 tokens" in capsys.readouterr().err
    assert "*.safetensors" in OWNED
