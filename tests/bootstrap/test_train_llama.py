"""The recipe of the small Llama, and the weights that are shipped."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bootstrap.train_llama import TrainLlamaConfig, conversations, main, measure_loss
from sparse_vlm.settings import build_settings

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "assets" / "scenes_llama"


def test_a_conversation_has_words_only_and_is_a_function_of_its_scene() -> None:
    first, second = islice(conversations(0, 5), 2)
    assert next(conversations(0, 5)) == first != second
    assert first.startswith("USER: ")
    assert "<image>" not in first
    assert first.count("USER: ") == first.count("ASSISTANT: ") == first.count("</s>")


def test_the_recipe_trains_and_its_result_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["model.width=32", "model.mlp_width=48", "model.depth=1", "model.heads=2", "model.vocabulary=300"]
    small = ["steps=4", "batch_size=2", "length=32", "tokenizer_scenes=4", "final_scenes=2", "warmup_steps=1"]
    config = tmp_path / "c.yaml"
    config.write_text(f"out: {tmp_path / 'llama'}\n")
    assert main([str(config), *tiny, *small]) == 0
    result = json.loads((tmp_path / "llama" / "result.json").read_text())
    assert result["tokens_seen"] == 4 * 2 * 32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert model.config.vocab_size == len(tokenizer)
    for text in ("How many red stars are there? 42", "naïve “é” 你好"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("97")["input_ids"]) == 2  # one digit a token
    chat = [{"role": "user", "content": "What?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == "USER: What? ASSISTANT:"
    assert main([str(config), "model.heads=3"]) == 1
    assert "heads must divide width" in capsys.readouterr().err


def test_the_shipped_model_knows_the_words_of_scenes() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "scenes" / "llama.yaml").read_text())
    config = build_settings(TrainLlamaConfig, settings, (), "llama.yaml")
    assert AutoModelForCausalLM.from_pretrained(SHIPPED).config.hidden_size == config.model.width
    # An untrained model stands at ln(512) = 6.2; unforeseeable answers and choices of words cost about 0.6.
    assert measure_loss(SHIPPED, config, 20) < 0.9
    weights = sum(path.stat().st_size for path in SHIPPED.iterdir())
    assert weights < 4e6
