"""Asking a model about pictures: from Python and in the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm_integration.chat import main, run_chat
from llm_integration.generate import Chat, answer, build_message, load_chat, open_picture
from llm_integration.load import load_llava
from llm_integration.processor import load_processor
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


def test_answer_takes_files_pictures_several_and_none(chat: Chat, picture: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    whole = answer(picture, "What?", chat, max_new_tokens=4)
    assert answer(path, "What?", chat, max_new_tokens=4) == whole
    assert answer([str(path)], "What?", chat, max_new_tokens=4) == whole
    assert isinstance(answer(None, "What?", chat, max_new_tokens=2), str)


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
    lines = f"What is it?\n/image {gone}\n/image {there}\nAnd now?\n/new\nhi\n/quit\nno\n"
    out = io.StringIO()
    run_chat(chat, picture, io.StringIO(lines), out, max_new_tokens=3)
    said = out.getvalue()
    assert said.count("model: ") == 3
    assert [f"[{n} visual of" in said for n in (9, 18, 0)] == [True] * 3
    assert "first token after" in said
    assert "there is no picture" in said
    assert "b.png goes with your next question" in said


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


def test_errors_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "none")])
    assert (
        capsys.readouterr().err
        == f"error: there is no model directory at {tmp_path / 'none'} (no config.json)\n"
    )
