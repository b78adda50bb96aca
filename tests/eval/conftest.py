"""A tiny assembled LLaVA and a small benchmark, for what runs a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.llm_integration.conftest import (  # noqa: F401 - fixtures
    bpe_tokenizer,
    build_llm_dir,
    encoder_dir,
    llava_dir,
    tiny_encoder_config,
)


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """A folder with an easy-VQA question file (ten questions about four pictures) and its pictures."""
    folder = tmp_path / "quiz"
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40 + 9 * number, 30), (60 * number, 200 - 50 * number, 90)).save(
            folder / "images" / f"{number}.png"
        )
    rows = [[f"is it{' really' * (n % 3)} number {n}?", "yes", n % 4] for n in range(10)]
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder
