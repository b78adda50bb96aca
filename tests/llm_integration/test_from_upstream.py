"""Checkpoints of the llava package, in transformers' format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

import sparse_vlm
from llm_integration.from_upstream import main, split_weights
from llm_integration.generate import load_chat
from llm_integration.llava.directories import read_fingerprint
from llm_integration.load import load_checked_processor, load_llava, load_llava_config
from llm_integration.regions import draw_regions
from llm_integration.tower import SparseFormerVisionTower

SENTENCES = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What colour is it? ASSISTANT: It is red. It is green.",
]
QUESTION = "What colour is it?"


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, with a SentencePiece tokenizer as Vicuna's."""
    folder = tmp_path_factory.mktemp("vicuna") / "llm"
    folder.mkdir()
    (folder.parent / "corpus.txt").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder.parent / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=340,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=5000.0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP tower of three blocks."""
    folder = tmp_path_factory.mktemp("clip") / "vit"
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, initializer_range=0.2,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


Write = Callable[..., Path]


@pytest.fixture
def write_checkpoint(tmp_path: Path, vicuna: Path, encoder_dir: Path) -> Write:
    """Write what ``llava.train.train`` writes: names and keys are those of release 1.2.2."""

    def write(name: str = "checkpoint", extra: dict[str, Tensor] | None = None, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(vicuna, folder)
        weights = load_file(folder / "model.safetensors")
        weights |= {f"model.{key}": value for key, value in build_projector().items()} | (extra or {})
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        values = json.loads((folder / "config.json").read_text())
        # As transformers 4 wrote it.
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
        values |= {
            "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 32,
            "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
            "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "image_aspect_ratio": "pad",
            "mm_vision_tower": str(encoder_dir), "mm_vision_tower_sha256": read_fingerprint(encoder_dir),
            "tokenizer_model_max_length": 512, "use_mm_proj": True, "tune_mm_mlp_adapter": False,
        }  # fmt: skip
        values |= changes
        values = {key: value for key, value in values.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(values))
        generation = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return write


def build_projector() -> dict[str, Tensor]:
    """LLaVA's projector, under its names in a whole model."""
    torch.manual_seed(2)
    projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    return {f"mm_projector.{key}": value.clone() for key, value in projector.state_dict().items()}


def expand(picture: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """The square that LLaVA makes of a picture lying on its side."""
    square = Image.new("RGB", (picture.width, picture.width), tuple(int(each * 255) for each in mean))
    square.paste(picture, (0, (picture.width - picture.height) // 2))
    return square


@torch.no_grad()
def ask_by_hand(vicuna: Path, seen: Tensor) -> Tensor:
    """Logits for a question about a picture, put together as LLaVA does: pieces of text around its tokens."""
    tokenizer = LlamaTokenizer.from_pretrained(str(vicuna))
    llm = LlamaForCausalLM.from_pretrained(vicuna)
    lead = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: "
    )
    before, behind = (tokenizer(text).input_ids for text in (lead, f"\n{QUESTION} ASSISTANT:"))
    assert before[0] == behind[0] == tokenizer.bos_token_id
    words = llm.get_input_embeddings()
    projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    weights = build_projector()
    projector.load_state_dict({key.removeprefix("mm_projector."): weights[key] for key in weights})
    parts = [words(torch.tensor(before)), projector(seen), words(torch.tensor(behind[1:]))]
    return llm(inputs_embeds=torch.cat(parts)[None]).logits[0]


def ask(folder: Path, picture: Image.Image) -> Tensor:
    """The same of a converted model, through its own processor and template."""
    model = load_llava(folder, torch.float32)
    processor: Any = load_checked_processor(folder, model.config)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    batch = processor(text=prompt, images=[picture], return_tensors="pt")
    with torch.no_grad():
        logits: Tensor = model(**batch).logits[0]
    return logits


def check_same(converted: Tensor, wanted: Tensor) -> None:
    """Equal, but for the image mark's own column."""
    assert converted.shape[0] == wanted.shape[0]
    torch.testing.assert_close(converted[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("feature", "layer"), [("patch", -2), ("cls_patch", -1), ("patch", 0)])
def test_it_answers_as_the_original(
    write_checkpoint: Write, vicuna: Path, encoder_dir: Path, tmp_path: Path, picture: Image.Image,
    feature: str, layer: int,
) -> None:  # fmt: skip
    checkpoint = write_checkpoint(mm_vision_select_feature=feature, mm_vision_select_layer=layer)
    main(["--llava", str(checkpoint), "--out", str(tmp_path / "out")])
    words = SimpleNamespace(mm_vision_select_feature=feature, mm_vision_select_layer=layer)
    tower = SparseFormerVisionTower(encoder_dir, words)
    square = expand(picture, tuple(tower.image_processor.image_mean))
    seen = tower(tower.image_processor(square, return_tensors="pt")["pixel_values"])[0]
    check_same(ask(tmp_path / "out", picture), ask_by_hand(vicuna, seen))
    facts = json.loads((tmp_path / "out" / "assembly.json").read_text())
    assert facts["converted_from"] == str(checkpoint)


@pytest.mark.parametrize(
    ("template", "system"),
    [
        ("chatml_direct", "Answer the questions."),
        (
            "mpt",
            "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
            "honest answers.",
        ),
    ],
)
def test_its_chatml_is_llavas(write_checkpoint: Write, tmp_path: Path, template: str, system: str) -> None:
    main(["--llava", str(write_checkpoint()), "--out", str(tmp_path / "out"), "--template", template])
    processor: Any = load_checked_processor(tmp_path / "out", load_llava_config(tmp_path / "out"))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    # As release 1.2.2 puts it together, but for the space behind the picture, which its tokenizing makes.
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        f"<|im_start|>system\n{system}<|im_end|><|im_start|>user\n<image> \n{QUESTION}<|im_end|>"
        "<|im_start|>assistant\nRed.<|im_end|><|im_start|>user\nAnd now?<|im_end|><|im_start|>assistant\n"
    )


def test_a_clip_tower_is_read_from_its_folder_unless_it_was_tuned(
    write_checkpoint: Write, vicuna: Path, clip_dir: Path, tmp_path: Path, picture: Image.Image
) -> None:
    torch.manual_seed(3)
    other = CLIPVisionModel(CLIPVisionModel.from_pretrained(clip_dir).config)
    prefix = "model.vision_tower.vision_tower.vision_model."
    inside = {prefix + key: value for key, value in other.state_dict().items()}
    for tuned, vit in ((None, CLIPVisionModel.from_pretrained(clip_dir)), (True, other)):
        checkpoint = write_checkpoint(
            f"tuned-{tuned}", inside, mm_vision_tower=str(clip_dir), mm_vision_tower_sha256=None,
            unfreeze_mm_vision_tower=tuned, image_aspect_ratio="square",
        )  # fmt: skip
        main(["--llava", str(checkpoint), "--out", str(tmp_path / "out")])
        pixels = CLIPImageProcessorPil.from_pretrained(clip_dir)(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = vit.eval()(pixels, output_hidden_states=True).hidden_states
        check_same(ask(tmp_path / "out", picture), ask_by_hand(vicuna, states[-2][0, 1:]))


def test_shards_of_either_kind_and_half_precision(write_checkpoint: Write, tmp_path: Path) -> None:
    checkpoint = write_checkpoint()
    weights = {key: value.half() for key, value in load_file(checkpoint / "model.safetensors").items()}
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights)
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # older files have it
    for number, part in enumerate((names[::2], names[1::2]), 1):
        piece = {name: weights[name] for name in part} | (inverse if number == 1 else {})
        torch.save(piece, checkpoint / f"pytorch_model-0000{number}-of-00002.bin")
    main(["--llava", str(checkpoint), "--out", str(tmp_path / "out")])
    model = load_llava(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    projector = model.model.multi_modal_projector.linear_2.weight
    assert torch.equal(projector, weights["model.mm_projector.2.weight"])
    assert load_llava_config(tmp_path / "out").text_config.rope_parameters["rope_theta"] == 5000.0
    main(["--llava", str(checkpoint), "--out", str(tmp_path / "out"), "--dtype", "float32"])
    assert load_llava(tmp_path / "out").dtype == torch.float32


def test_a_projector_alone_and_a_language_model(
    write_checkpoint: Write, vicuna: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint()
    (folder / "model.safetensors").unlink()
    weights = {f"model.{key}": value for key, value in build_projector().items()}
    torch.save(weights, folder / "mm_projector.bin")
    with pytest.raises(SystemExit):
        main(["--llava", str(folder), "--out", str(tmp_path / "out")])
    assert "name its language model with --llm" in capsys.readouterr().err
    main(["--llava", str(folder), "--out", str(tmp_path / "out"), "--llm", str(vicuna)])
    model = load_llava(tmp_path / "out")
    assert torch.equal(
        model.model.multi_modal_projector.linear_1.weight, weights["model.mm_projector.0.weight"]
    )


def test_a_projector_beside_whole_weights_changes_nothing(
    write_checkpoint: Write, vicuna: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint()
    others = {f"model.{key}": torch.zeros_like(value) for key, value in build_projector().items()}
    torch.save(others, checkpoint / "mm_projector.bin")
    words = ["--llava", str(checkpoint), "--out", str(tmp_path / "out")]
    main(words)
    projector = load_llava(tmp_path / "out").model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, build_projector()["mm_projector.0.weight"])
    with pytest.raises(SystemExit):
        main([*words, "--llm", str(vicuna)])
    assert "brings its own language model" in capsys.readouterr().err


def test_a_moved_tower_is_named_or_lies_beside(
    write_checkpoint: Write, encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = write_checkpoint(mm_vision_tower=str(tmp_path / "gone"))
    words = ["--llava", str(gone), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(words)
    assert "is not there any more" in capsys.readouterr().err
    main([*words, "--vision-tower", str(encoder_dir)])
    shutil.copytree(encoder_dir, gone / "vision_tower")
    main(words)
    with pytest.raises(SystemExit):  # what the user names is not passed over for what lies beside
        main([*words, "--vision-tower", str(tmp_path)])
    assert f"and {tmp_path} is none" in capsys.readouterr().err
    other = sparse_vlm.load_encoder(encoder_dir)
    nn.init.zeros_(other.stem.conv.weight)
    other.save(tmp_path / "other", {})
    with pytest.raises(SystemExit):
        main([*words, "--vision-tower", str(tmp_path / "other")])
    assert "other weights than the vision tower" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mm_projector_type": "linear"}, "projector of type 'linear'"),
        ({"mm_use_im_start_end": True}, "marks before and after each picture"),
        ({"image_aspect_ratio": "anyres"}, "cuts pictures into tiles"),
        ({"model_type": "llava_mpt"}, "holds a 'llava_mpt' model; what can be converted is llava"),
        ({"mm_vision_tower": None}, "that the llava package has not trained"),
        ({"mm_vision_select_layer": 9}, "mm_vision_select_layer 9"),
        ({"mm_vision_tower": "nobody/nothing", "mm_vision_tower_sha256": None}, "with --vision-tower"),
        ({"intermediate_size": 48}, "weights of the language model are missing, extra or misshapen"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    write_checkpoint: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any], sentence: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(["--llava", str(write_checkpoint(**changes)), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_and_lost_weights_are_refused(
    write_checkpoint: Write, vicuna: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint()
    words = ["--llava", str(checkpoint), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*words, "--llm", str(vicuna)])
    assert "brings its own language model" in capsys.readouterr().err
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "mm_projector.2" not in k}, checkpoint / "model.safetensors"
    )
    with pytest.raises(SystemExit):
        main(words)
    assert "of the projector are missing" in capsys.readouterr().err
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(words)
    assert "merge_lora_weights.py" in capsys.readouterr().err


def test_files_that_hold_no_weights_are_named(
    write_checkpoint: Write, vicuna: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint()
    whole = (checkpoint / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    torch.save(build_projector(), tmp_path / "whole.bin")
    half = (tmp_path / "whole.bin").read_bytes()[:1000]
    contents = (
        ("model.safetensors", whole[: len(whole) // 2]), ("model.safetensors", pointer),
        ("pytorch_model.bin", half), ("pytorch_model.bin", pointer), ("pytorch_model.bin", b""),
        ("mm_projector.bin", pointer),
    )  # fmt: skip
    (checkpoint / "model.safetensors").unlink()
    for name, content in contents:
        (checkpoint / name).write_bytes(content)
        more = ["--llm", str(vicuna)] if name == "mm_projector.bin" else []
        with pytest.raises(SystemExit) as stop:
            main(["--llava", str(checkpoint), "--out", str(tmp_path / "out"), *more])
        assert stop.value.code == 2
        assert f"{checkpoint / name} is damaged, or holds no weights (" in capsys.readouterr().err
        (checkpoint / name).unlink()


def test_every_weight_finds_its_part() -> None:
    names = ["model.mm_projector.0.bias", "lm_head.weight", "model.vision_tower.encoder.stem.conv.weight",
             "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"]  # fmt: skip
    llm, projector, clip = split_weights(iter((name, torch.ones(1)) for name in names))
    assert (list(llm), list(projector)) == (["lm_head.weight"], ["linear_1.bias"])
    assert list(clip) == ["embeddings.class_embedding"]


def test_regions_are_drawn_over_the_padded_picture(
    write_checkpoint: Write, tmp_path: Path, encoder_dir: Path
) -> None:
    main(["--llava", str(write_checkpoint()), "--out", str(tmp_path / "out")])
    wide = Image.new("RGB", (400, 100), (255, 255, 255))
    drawn = draw_regions(load_chat(tmp_path / "out"), wide, columns=1, panel_width=200)
    mean = sparse_vlm.load_encoder(encoder_dir).transform.config.mean
    bar = tuple(int(each * 255) for each in mean)
    colours = {colour for _, colour in drawn.getcolors(1 << 24) or []}
    assert bar in colours
    assert (255, 255, 255) in colours
