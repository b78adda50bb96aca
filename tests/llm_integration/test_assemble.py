"""A LLaVA put together from an encoder and a language model, in unmodified transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import sparse_vlm
from llm_integration.assemble import assemble, check_place, main, save_llava
from llm_integration.generate import load_chat
from llm_integration.load import load_llava
from llm_integration.processor import count_image_tokens, load_processor, pad_square


def _chat(*parts: Any) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
    ]
    return [{"role": "user", "content": content}]


def _prepare(processor: Any, *chats: Any) -> Any:
    return processor.apply_chat_template(
        list(chats),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@pytest.fixture(scope="module")
def model(llava_dir: Path) -> LlavaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(llava_dir)


@pytest.fixture(scope="module")
def processor(llava_dir: Path) -> LlavaProcessor:
    return load_processor(llava_dir)


def test_it_is_plain_llava(llava_dir: Path, model: Any, processor: Any) -> None:
    assert type(model) is LlavaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(llava_dir)) is LlavaProcessor
    assert model.config.vision_feature_layer == -1
    assert model.config.vision_feature_select_strategy == "full"
    assert count_image_tokens(processor) == model.config.image_seq_length == 9
    _, report = AutoModelForImageTextToText.from_pretrained(llava_dir, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("size", [(1, 1), (31, 400), (224, 224), (1000, 30)])
def test_n_image_tokens_at_any_size(model: Any, processor: Any, size: tuple[int, int]) -> None:
    inputs = _prepare(processor, _chat(Image.new("RGB", size, "red"), "what?"))
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 9


def test_image_tokens_do_not_depend_on_the_size_of_the_input(model: Any, processor: Any) -> None:
    inputs = _prepare(processor, _chat(Image.new("RGB", (9, 9), "red"), "what?"))
    inputs["pixel_values"] = torch.randn(1, 3, 90, 41)
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("kind", [None, *ALL_CACHE_IMPLEMENTATIONS])
def test_caches_agree(model: Any, processor: Any, picture: Image.Image, kind: str | None) -> None:
    if kind == "quantized":
        pytest.importorskip("optimum.quanto", reason="quantized caches need optimum-quanto")
    if kind and "offloaded" in kind and not torch.cuda.is_available():
        pytest.skip("offloading a cache needs a CUDA device")
    inputs = _prepare(processor, _chat(picture, "What is it?"))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    dynamic = model.generate(**inputs, **settings)
    how: dict[str, Any] = (
        {"cache_implementation": kind, "disable_compile": True} if kind else {"use_cache": False}
    )
    assert torch.equal(model.generate(**inputs, **settings, **how), dynamic)
    assert model.config.image_token_id not in dynamic[0, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_sliding_windows_keep_the_picture_in_its_place(
    encoder_dir: Path, build_llm_dir: Callable[..., Path], picture: Image.Image, tmp_path: Path, kind: str
) -> None:
    assemble(encoder_dir, str(build_llm_dir(kind)), tmp_path / "out", template="chatml")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["sliding_window"] = 16  # shorter than the prompt
    path.write_text(json.dumps(values))
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = load_processor(tmp_path / "out")
    inputs = _prepare(processor, _chat(picture, "What is it?"))
    assert inputs["input_ids"].shape[1] > 16
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = model.generate(**inputs, **settings, use_cache=False)
    assert torch.equal(model.generate(**inputs, **settings), whole)
    static = model.generate(**inputs, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, whole)


def test_left_padded_batch_with_several_pictures_and_text_alone(
    model: Any, processor: Any, picture: Image.Image
) -> None:
    assert processor.tokenizer.padding_side == "left"
    chats = [
        _chat(picture, "What?"),
        _chat(picture, picture.rotate(90), "Which of the two pictures is the redder one?"),
        _chat("No picture here."),
    ]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    batch = _prepare(processor, *chats)
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        inputs = _prepare(processor, chat)
        alone = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(alone[0], together[row]), row


def test_the_answer_depends_on_the_picture(model: Any, processor: Any, picture: Image.Image) -> None:
    first = _prepare(processor, _chat(picture, "What?"))
    second = _prepare(processor, _chat(Image.new("RGB", (20, 20), "white"), "What?"))
    assert not torch.allclose(model(**first).logits[:, -1], model(**second).logits[:, -1])


def test_pipeline(llava_dir: Path, model: Any, processor: Any, picture: Image.Image) -> None:
    run = pipeline("image-text-to-text", model=model, processor=processor)
    answer = run(text=_chat(picture, "What is it?"), max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


def test_save_and_load_are_bit_equal(
    model: Any, processor: Any, picture: Image.Image, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = _prepare(processor, _chat(picture, "What?"))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(
    llava_dir: Path, processor: Any, picture: Image.Image
) -> None:
    inputs = _prepare(processor, _chat(picture, "What is it?"))
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(llava_dir).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert [name for name, gradient in gradients[0].items() if gradient is None] == []
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_full_graph_compile(llava_dir: Path, processor: Any, picture: Image.Image, backend: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava_dir)
    inputs = _prepare(processor, _chat(picture, "What?"))
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        torch._dynamo.reset()
        got = torch.compile(model, backend=backend, fullgraph=True)(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, expected)


def test_attention_implementations_agree(llava_dir: Path, processor: Any, picture: Image.Image) -> None:
    inputs = _prepare(processor, _chat(picture, "What?"))
    logits = [
        AutoModelForImageTextToText.from_pretrained(llava_dir, attn_implementation=kind)(**inputs).logits
        for kind in ("eager", "sdpa")
    ]
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("tied", [False, True])
def test_other_language_models(
    encoder_dir: Path,
    build_llm_dir: Callable[..., Path],
    picture: Image.Image,
    tmp_path: Path,
    kind: str,
    tied: bool,
) -> None:
    llm_dir = build_llm_dir(kind, tied)
    assemble(encoder_dir, str(llm_dir), tmp_path / "out", num_tokens=4, template="chatml")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = load_processor(tmp_path / "out")
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    inputs = _prepare(processor, _chat(picture, "What?"))
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4
    model.generate(**inputs, max_new_tokens=2)
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    text = torch.tensor([[5, 6, 7]])
    llm = AutoModelForCausalLM.from_pretrained(llm_dir)
    rows = llm.config.vocab_size
    torch.testing.assert_close(model(input_ids=text).logits[..., :rows], llm(input_ids=text).logits)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[model.config.image_token_id], table[:rows].mean(dim=0))


def test_assembly_says_where_its_parts_come_from(llava_dir: Path, encoder_dir: Path) -> None:
    facts = json.loads((llava_dir / "assembly.json").read_text())
    assert facts["encoder"] == str(encoder_dir)
    assert facts["encoder_provenance"]["teacher"] == "none: formula weights"
    assert len(facts["tower_sha256"]) == 64


@pytest.mark.parametrize("damaged", ["{", "[]"])
def test_what_is_known_of_a_model_in_the_place_is_read_strictly(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "assembly.json").write_text(damaged)
    with pytest.raises(ValueError, match=r"assembly\.json (is not valid JSON|must hold a JSON object)"):
        check_place(tmp_path)


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("PhiConfig", {"hidden_size": 32, "num_attention_heads": 2}, "of this PhiForCausalLM has a bias"),
        ("GPT2Config", {"n_embd": 32, "n_head": 2}, "LLaVA cannot hold a GPT2Model: .*embed_tokens"),
    ],
)
def test_a_language_model_that_llava_cannot_hold_is_refused(
    encoder_dir: Path, build_llm_dir: Any, tmp_path: Path, kind: str, sizes: dict[str, int], message: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(build_llm_dir("llama"))
    config = getattr(transformers, kind)(
        vocab_size=len(tokenizer), num_hidden_layers=1, eos_token_id=0, bos_token_id=None, **sizes
    )
    llm: Any = AutoModelForCausalLM.from_config(config)
    if llm.lm_head.bias is not None:
        torch.nn.init.ones_(llm.lm_head.bias)
    for part in (llm, tokenizer):
        part.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=message):
        assemble(encoder_dir, str(tmp_path / "llm"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_stops_where_its_template_does(llava_dir: Path, tmp_path: Path) -> None:
    model, processor = load_llava(llava_dir), load_processor(llava_dir)
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    processor.chat_template = text
    save_llava(model, processor, tmp_path / "out", {})
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    ends = settings.eos_token_id
    tokenizer: Any = processor.tokenizer
    assert isinstance(ends, list)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends


def test_a_plain_name_is_a_path(
    encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--encoder", str(encoder_dir), "--llm", "some/model", "--out", str(tmp_path / "x")])
    assert "write --llm hf:some/model" in capsys.readouterr().err


def test_a_llava_is_no_language_model(encoder_dir: Path, llava_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a 'llava' model, expected .*llm_integration\.swap$"):
        assemble(encoder_dir, str(llava_dir), tmp_path / "out")


def test_more_visual_tokens_than_positions_are_refused(
    encoder_dir: Path, build_llm_dir: Any, tmp_path: Path
) -> None:
    llm = str(build_llm_dir("llama"))
    positions = json.loads((Path(llm) / "config.json").read_text())["max_position_embeddings"]
    message = (
        f"{positions} visual tokens leave no room for words in the language model's {positions} positions"
    )
    with pytest.raises(ValueError, match=message):
        assemble(encoder_dir, llm, tmp_path / "out", num_tokens=positions)
    assert not (tmp_path / "out").exists()
    config = json.loads((Path(llm) / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (Path(llm) / "config.json").write_text(json.dumps(config))
    assemble(encoder_dir, llm, tmp_path / "out", num_tokens=positions)


def test_other_files_are_not_overwritten(encoder_dir: Path, build_llm_dir: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        assemble(encoder_dir, str(build_llm_dir("llama")), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.real_data
def test_real_language_model(
    encoder_dir: Path, real_data: Path, picture: Image.Image, tmp_path: Path
) -> None:
    assemble(encoder_dir, str(real_data / "babyllama"), tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = load_processor(tmp_path / "out")
    text = processor.tokenizer("Once upon a time", return_tensors="pt")
    assert text["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    story = processor.decode(
        model.generate(**text, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True
    )
    assert "there was a little" in story
    inputs = _prepare(processor, _chat(picture, "what is it?"))
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_settings_that_nothing_reads_do_not_stop_an_assembly(
    encoder_dir: Path, build_llm_dir: Callable[..., Path], tmp_path: Path
) -> None:
    # As Vicuna publishes them: transformers reads such a file, and refuses to write it once it has changed.
    llm = shutil.copytree(build_llm_dir("llama"), tmp_path / "llm")
    published = {"temperature": 0.9, "top_p": 0.6, "length_penalty": 2.0, "max_length": 99, "bos_token_id": 1}
    (llm / "generation_config.json").write_text(json.dumps(published))
    assemble(encoder_dir, str(llm), tmp_path / "out")
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (written.temperature, written.top_p, written.length_penalty) == (None, None, None)
    assert written.max_length == 99
    drawn = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    (llm / "generation_config.json").write_text(json.dumps(drawn))
    assemble(encoder_dir, str(llm), tmp_path / "out")
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(written, name) for name in drawn} == drawn


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_rows_that_a_language_model_keeps_free_are_no_change_of_its_words(
    encoder_dir: Path, build_llm_dir: Callable[..., Path], tmp_path: Path, capsys: Any, kind: str
) -> None:
    llm = AutoModelForCausalLM.from_pretrained(build_llm_dir(kind))
    tokenizer = AutoTokenizer.from_pretrained(build_llm_dir(kind))
    known = len(tokenizer)
    llm.resize_token_embeddings(known + 30, mean_resizing=False)
    with torch.no_grad():
        llm.get_output_embeddings().weight[known:] = 9.0  # far from the mean that the image token gets
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    assemble(encoder_dir, str(tmp_path / "llm"), tmp_path / "out")
    assert "warning" not in capsys.readouterr().err
    model = load_llava(tmp_path / "out")
    assert model.config.text_config.vocab_size == known + 30
    assert model.config.image_token_id == known


def test_of_several_templates_the_default_one_is_the_models(
    encoder_dir: Path, build_llm_dir: Callable[..., Path], tmp_path: Path
) -> None:
    llm = shutil.copytree(build_llm_dir("llama"), tmp_path / "llm")
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    file = llm / "tokenizer_config.json"
    written = json.loads(file.read_text())
    for names in (("default", "tool_use"), ("rag", "tool_use")):
        templates = [{"name": names[0], "template": own}, {"name": names[1], "template": "tools" + own}]
        file.write_text(json.dumps({**written, "chat_template": templates}))
        if names[0] == "default":
            for _ in range(2):  # also over itself: nothing is left that is not ours
                assemble(encoder_dir, str(llm), tmp_path / "out")
            template: Any = load_processor(tmp_path / "out").chat_template
            assert template.endswith(own)
            assert "tools" not in template
            assert load_chat(tmp_path / "out").reply(_chat("What?"), 3).prompt_tokens > 3
        else:
            with pytest.raises(ValueError, match=r"chat templates \(rag, tool_use\) none is called default"):
                assemble(encoder_dir, str(llm), tmp_path / "out")


def test_pictures_are_padded_where_that_is_asked_for(
    encoder_dir: Path, build_llm_dir: Callable[..., Path], tmp_path: Path
) -> None:
    words = [
        "--encoder",
        str(encoder_dir),
        "--llm",
        str(build_llm_dir("llama")),
        "--out",
        str(tmp_path / "x"),
    ]
    main([*words, "--pad"])
    padding = load_processor(tmp_path / "x")
    transform = sparse_vlm.load_encoder(encoder_dir).transform
    mean = tuple(int(each * 255) for each in transform.config.mean)
    for width, height in ((90, 40), (31, 64), (50, 50)):
        picture = Image.effect_noise((width, height), 90).convert("RGB")
        edge = max(width, height)
        square = Image.new("RGB", (edge, edge), mean)
        square.paste(picture, ((edge - width) // 2, (edge - height) // 2))
        pixels = padding(text="<image>", images=[picture], return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels[0], transform(square))
        assert pad_square(picture, padding).tobytes() == square.tobytes()
    main(words)
    cropping = load_processor(tmp_path / "x")
    pixels = cropping(text="<image>", images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], transform(picture))


@pytest.mark.parametrize(
    ("provenance", "asked", "warned"),
    [
        ({"config": {"student": {"token_counts": [9, 5]}}}, None, None),
        ({"config": {"student": {"token_counts": [9, 5]}}}, 5, None),
        ({"config": {"student": {"token_counts": [9, 5, 9]}}}, 7, "bootstrapped with 5 and 9 tokens"),
        ({"config": {"student": {"token_counts": []}}}, 7, "bootstrapped with 9 tokens"),
        ({"teacher": "official"}, 16, "bootstrapped with 9 tokens; what it sees with 16"),
        ({}, None, None),
    ],
)
def test_a_token_count_that_was_never_trained_is_named(
    encoder_dir: Path, build_llm_dir: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], provenance: dict[str, Any], asked: int | None, warned: str | None,
) -> None:  # fmt: skip
    sparse_vlm.load_encoder(encoder_dir).save(tmp_path / "encoder", provenance)
    assemble(tmp_path / "encoder", str(build_llm_dir("llama")), tmp_path / "x", asked)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == (warned is not None)
    assert warned is None or warned in said[0]
