"""Answers over HTTP, by the server of transformers."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from llm_integration import serve
from llm_integration.assemble import assemble
from llm_integration.generate import load_chat
from llm_integration.processor import load_processor
from llm_integration.result import RUN_FILE

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def address(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server over a tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    words = ["-m", "llm_integration.serve", "--model", str(llava_dir), "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    try:
        end = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://localhost:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(30)


def _send(address: str, directory: Path, pictures: list[Image.Image], **more: Any) -> str:
    content: list[dict[str, Any]] = []
    for picture in pictures:
        stream = io.BytesIO()
        picture.save(stream, "png")
        uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": uri}})
    content.append({"type": "text", "text": QUESTION})
    body = {"model": str(directory), "max_tokens": 8, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        address, json.dumps({**body, **more}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        text: str = reply.read().decode()
    return text


def test_it_answers_as_the_model_does(address: str, llava_dir: Path, picture: Image.Image) -> None:
    chat = load_chat(llava_dir)
    for pictures in ([picture], [picture, picture.rotate(90)], []):
        content = [
            *({"type": "image", "image": each} for each in pictures),
            {"type": "text", "text": QUESTION},
        ]
        wanted = chat.reply([{"role": "user", "content": content}], max_new_tokens=8)
        made = json.loads(_send(address, llava_dir, pictures))
        assert made["choices"][0]["message"]["content"].strip() == wanted.text
        assert made["usage"]["prompt_tokens"] == wanted.prompt_tokens


def test_it_streams(address: str, llava_dir: Path, picture: Image.Image) -> None:
    whole = json.loads(_send(address, llava_dir, [picture]))["choices"][0]["message"]["content"]
    lines = _send(address, llava_dir, [picture], stream=True).splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events if event.get("choices")]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces) == whole


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / RUN_FILE).write_text("{}"), "python -m llm_integration.export --run"),
        (lambda folder: (folder / "config.json").unlink(), "there is no model directory"),
        (lambda folder: (folder / "chat_template.jinja").write_text("<image>"), "leaves out what is asked"),
    ],
)
def test_what_cannot_be_served_is_refused(
    encoder_dir: Path, build_llm_dir: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], sentence: str,
) -> None:  # fmt: skip
    assemble(encoder_dir, str(build_llm_dir("llama")), tmp_path / "llava")
    spoil(tmp_path / "llava")
    with pytest.raises(SystemExit) as stop:
        serve.main(["--model", str(tmp_path / "llava")])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_server_gets_its_words_and_the_encoders_own_bits(
    llava_dir: Path, monkeypatch: pytest.MonkeyPatch, picture: Image.Image
) -> None:
    seen: list[Any] = []

    def server() -> None:
        processor = AutoProcessor.from_pretrained(str(llava_dir), trust_remote_code=False)
        seen.extend([sys.argv, processor(text="<image>", images=[picture], return_tensors="pt")])

    monkeypatch.setattr(serve, "find_server", lambda: server)
    before = sys.argv
    serve.main(["--model", str(llava_dir), "--port", "1", "--compile"])
    assert seen[0] == ["transformers", "serve", str(llava_dir), "--port", "1", "--compile"]
    wanted = load_processor(llava_dir)(text="<image>", images=[picture], return_tensors="pt")
    assert torch.equal(seen[1]["pixel_values"], wanted["pixel_values"])
    assert sys.argv is before


def test_packages_that_are_missing_are_named(
    llava_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    with pytest.raises(SystemExit):
        serve.main(["--model", str(llava_dir)])
    assert 'pip install "sparse-vlm[serve]"' in capsys.readouterr().err
