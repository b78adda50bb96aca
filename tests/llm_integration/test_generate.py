"""Asking a model about pictures: from Python and in the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from eval.costs.graphs import graph_tower
from llm_integration.chat import main, run_chat
from llm_integration.data.sources import decode
from llm_integration.generate import Chat, Reply, answer, build_message, load_chat, open_picture
from llm_integration.load import load_llava
from llm_integration.processor import count_image_tokens, load_processor
from llm_integration.room import PromptTooLongError, count_positions
from llm_integration.templates import build_template, find_end
from sparse_vlm.digits import DigitLinear, what_is_missing


@pytest.fixture(scope="module")
def chat(llava_dir: Path) -> Chat:
    return load_chat(llava_dir, device="cpu")


def test_a_reply_says_what_it_took(chat: Chat, picture: Image.Image) -> None:
    pieces: list[str] = []
    messages = [build_message("Which one?", [picture, picture.rotate(90)])]
    reply = chat.reply(messages, max_new_tokens=6, on_text=pieces.append)
    assert reply.visual_tokens == 2 * chat.visual_tokens == 18
    assert reply.prompt_tokens > 18
    assert 1 <= reply.new_tokens <= 6
    assert 0 < reply.seconds_to_first_token <= reply.seconds
    assert "".join(pieces).strip() == reply.text
    assert chat.reply(messages, max_new_tokens=6).text == reply.text


def test_a_reply_of_one_word_has_no_rate_of_further_ones() -> None:
    assert "then" not in Reply("yes", 9, 12, 1, 0.1, 0.2).describe()
    assert "first token after 0.10 s, then 20.0 tokens/s" in Reply("yes, it", 9, 12, 3, 0.1, 0.2).describe()


def test_answer_takes_files_pictures_several_and_none(chat: Chat, picture: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    whole = answer(picture, "What?", chat, max_new_tokens=4)
    assert answer(path, "What?", chat, max_new_tokens=4) == whole
    assert answer([str(path)], "What?", chat, max_new_tokens=4) == whole
    assert isinstance(answer(None, "What?", chat, max_new_tokens=2), str)


def test_a_question_with_the_image_mark_is_refused(chat: Chat, picture: Any) -> None:
    for shown in (picture, None):
        with pytest.raises(ValueError, match="leave <image> out of the question '<image>"):
            answer(shown, "<image>\nWhat is it?", chat)


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no picture"):
        open_picture(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no")
    with pytest.raises(ValueError, match="is no picture that can be read"):
        open_picture(tmp_path / "text.jpg")


def test_a_processor_of_another_model_is_refused(llava_dir: Path) -> None:
    processor = load_processor(llava_dir)
    processor.num_additional_image_tokens = 4
    with pytest.raises(ValueError, match="writes 4 image tokens for a picture, the model's encoder makes 9"):
        Chat(load_llava(llava_dir), processor)


def test_terminal_chat(chat: Chat, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "b.png")
    gone, there = tmp_path / "gone.png", tmp_path / "b.png"
    lines = f"What is it?\nWhat is <image>?\n/image {gone}\n/image {there}\nAnd now?\n/new\nhi\n/quit\nno\n"
    out = io.StringIO()
    run_chat(chat, picture, io.StringIO(lines), out, max_new_tokens=3)
    said = out.getvalue()
    assert said.count("model: ") == 3
    assert [f"[{n} visual of" in said for n in (9, 18, 0)] == [True] * 3
    assert "first token after" in said
    assert "(<image> stands for a picture: show one with /image FILE)" in said
    assert "there is no picture" in said
    assert "b.png goes with your next question" in said


def test_what_the_language_model_has_no_positions_for_is_refused(chat: Chat, picture: Image.Image) -> None:
    with pytest.raises(
        PromptTooLongError, match=r"the prompt is \d+ tokens long, 540 of them for pictures.*512"
    ):
        chat.reply([build_message("What?", [picture] * 60)], 4)
    out = io.StringIO()
    run_chat(chat, picture, io.StringIO(f"{'dog ' * 600}\nWhat?\n/quit\n"), out, max_new_tokens=2)
    refused, answered = out.getvalue().split("you: ")[1:3]
    assert "has 512 positions: ask with fewer pictures or words, or start over with /new)" in refused
    assert "[9 visual of" in answered  # the picture has waited


def test_an_answer_ends_with_the_last_position(
    chat: Chat, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [build_message("Which one?", [picture])]
    whole = chat.reply(messages, 12)
    assert whole.new_tokens == 12
    monkeypatch.setattr(chat, "positions", whole.prompt_tokens + 5)
    cut = chat.reply(messages, 12)
    assert cut.new_tokens == 5
    assert whole.text.startswith(cut.text)


@pytest.mark.parametrize(
    ("rotary", "positions"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}, 4096),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}, 32768),
        (None, 4096),
    ],
)
def test_stretched_positions_count(rotary: dict[str, Any] | None, positions: int) -> None:
    config = SimpleNamespace(max_position_embeddings=4096, rope_parameters=rotary)
    assert count_positions(config) == positions
    assert count_positions(SimpleNamespace()) is None


def test_what_is_typed_wrongly_does_not_end_the_conversation(
    chat: Chat, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture.save(tmp_path / "my dog.png")
    lines = '/imge x.png\n/IMAGE x\n/image "~/my dog.png"\nbroken \udcff text\n/etc/hosts is what?\n'
    out = io.StringIO()
    run_chat(chat, None, io.StringIO(lines), out, max_new_tokens=2)
    said = out.getvalue()
    assert "(there is no /imge; there are /image FILE, /new and /quit)" in said
    assert "there is no /IMAGE" in said
    assert "my dog.png goes with your next question" in said
    assert said.count("model: ") == 2
    assert "[9 visual of" in said


def test_photographs_of_telephones_stand_upright_in_a_chat(tmp_path: Path) -> None:
    lying = Image.new("RGB", (60, 30), "red")
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "photo.jpg", exif=exif)
    assert open_picture(tmp_path / "photo.jpg", upright=True).size == (30, 60)
    assert open_picture(tmp_path / "photo.jpg").size == (60, 30)  # as benchmarks' own code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature must be 0 or more"),
        (["--temperature", "nan"], "--temperature must be 0 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        (["--model", "RUN"], r"final?"),
        (["--device", "foo"], "device foo is no device"),
        (["--device", "cuda:99"], "device cuda:99, but PyTorch sees"),
    ],
)
def test_options_that_make_no_sense(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(
            ["--model", str(tmp_path), *(str(tmp_path / "run") if word == "RUN" else word for word in words)]
        )
    assert message in capsys.readouterr().err


def test_pictures_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Image.new("I;16", (8, 8), 30_000)
    deep.save(tmp_path / "deep.png")
    assert open_picture(tmp_path / "deep.png").getpixel((3, 3)) == (117, 117, 117)  # not clipped to white
    assert decode((tmp_path / "deep.png").read_bytes()).getpixel((3, 3)) == (117, 117, 117)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"deep\.png is no picture that can be read \(Image size"):
        open_picture(tmp_path / "deep.png")


@pytest.mark.skipif(what_is_missing() is not None, reason=f"no digits here: {what_is_missing()}")
def test_digits_answer_alike(
    llava_dir: Path, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    picture.save(tmp_path / "b.png")
    products = []
    multiply = DigitLinear._multiply
    monkeypatch.setattr(DigitLinear, "_multiply", lambda *words: products.append(1) or multiply(*words))
    said = []
    for flags in ([], ["--digits", "3"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
        words = ["--model", str(llava_dir), "--image", str(tmp_path / "b.png"), "--device", "cpu"]
        main([*words, "--dtype", "float32", "--max-new-tokens", "4", *flags])
        said.append(capsys.readouterr().out.split("model: ")[1].split("\n")[0])
        assert bool(products) == bool(flags)
    assert said[0] == said[1]
    with pytest.raises(SystemExit):
        main([*words, "--dtype", "bfloat16", "--digits", "2"])
    assert "--digits 2: digits are for weights in torch.float32 on cpu" in capsys.readouterr().err


def test_graphs_answer_alike(
    llava_dir: Path,
    chat: Chat,
    picture: Image.Image,
    stand_in_graphs: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, not cpu"):
        load_chat(llava_dir, "cpu", graphs=True)
    graphed = load_chat(llava_dir, "cpu")
    tower = graphed.model.model.vision_tower
    graph_tower(tower)
    monkeypatch.setattr(tower, "_may_replay", lambda: True)
    for number in range(2):
        question = [build_message(f"Which one, {number}?", [picture.rotate(90 * number)])]
        assert graphed.reply(question, 4).text == chat.reply(question, 4).text
    assert len(stand_in_graphs) == 1


def test_a_stock_tower_runs_through_graphs_too(stand_in_graphs: list[tuple[int, ...]]) -> None:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32
    )
    vit, pixels = CLIPVisionModel(config).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = vit(pixels, output_hidden_states=True)
        graph_tower(vit)
        for _ in range(2):
            graphed = vit(pixels, output_hidden_states=True)
            torch.testing.assert_close(dict(graphed), dict(plain), rtol=0, atol=0)
    assert type(graphed) is type(plain)
    assert stand_in_graphs == [(2, 3, 32, 32)]


def test_answers_end_where_the_template_ends_them(llava_dir: Path) -> None:
    """A model tuned with another template than it was put together with: its processor carries that."""
    processor: Any = load_processor(llava_dir)
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>\n{% endfor %}"
    assert find_end(tokenizer, build_template("own", text)) == turn
    in_parts = text.replace("m.content", "(m.content | selectattr('type', 'equalto', 'text') | first).text")
    assert find_end(tokenizer, in_parts) == turn
    assert find_end(tokenizer, text.replace("<|turn|>", "")) is None
    assert find_end(tokenizer, "{{ raise_exception('no') }}") is None
    processor.chat_template = text
    model = load_llava(llava_dir)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    before = model.generation_config.eos_token_id
    ends = set(before if isinstance(before, list) else [before])
    chat = Chat(model, processor)
    assert set(chat.model.generation_config.eos_token_id) == ends | {turn}


def test_a_stock_processor_writes_a_token_a_patch() -> None:
    tokenizer = Mock(spec=PreTrainedTokenizerFast)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for strategy, additional, wanted in (("default", 1, 4), ("full", 1, 5), ("full", 0, 4)):
        stock = Mock(
            tokenizer=tokenizer,
            image_processor=images,
            patch_size=14,
            num_additional_image_tokens=additional,
            vision_feature_select_strategy=strategy,
        )
        assert count_image_tokens(stock) == wanted


def test_errors_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "none")])
    assert (
        capsys.readouterr().err
        == f"error: there is no model directory at {tmp_path / 'none'} (no config.json)\n"
    )
