"""The recipe of the small Llama, and the weights that are shipped."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from bootstrap.scenes.scene import build_scene, printed_half_size
from bootstrap.scenes.symbols import SymbolicEye, describe_cells
from bootstrap.scenes.vocabulary import COLORS, NUMBERS, SHAPES, WORDS
from bootstrap.train_llama import (
    TrainLlamaConfig,
    build_batch,
    compute_loss,
    main,
    measure_loss,
    spell,
    talks,
)
from sparse_vlm.settings import build_settings

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "assets" / "scenes_llama"


def test_a_conversation_has_words_only_and_is_a_function_of_its_scene() -> None:
    (_, first), (_, second) = islice(talks(0, 5), 2)
    assert next(talks(0, 5))[1] == first != second
    words = spell(first)
    assert words.startswith("USER: ")
    assert "<image>" not in words
    assert words.count("USER: ") == words.count("ASSISTANT: ") == words.count("</s>") == len(first)


def test_symbols_say_what_stands_where() -> None:
    side, found = 9, 0
    for index in range(40):
        scene = build_scene(0, index, "train")
        kinds, numbers = describe_cells(scene, side)
        assert kinds.shape == (side * side, 4)
        assert numbers.shape == (side * side, 5)
        front = scene.objects[-1]  # nothing covers it
        cell = int(front.y * side) * side + int(front.x * side)
        assert kinds[cell, 0] == 1 + tuple(COLORS).index(front.color)
        assert kinds[cell, 1] == 1 + SHAPES.index(front.shape)
        assert numbers[cell, 2:].tolist() == pytest.approx([front.x, front.y, front.radius])
        beyond = (numbers[:, 0] - numbers[:, 2]).hypot(numbers[:, 1] - numbers[:, 3]) > 0.5
        assert not kinds[beyond & (kinds[:, 1] > 0)].any()
        if scene.printed is not None:
            found += 1
            cell = int(scene.printed.y * side) * side + int(scene.printed.x * side)
            assert kinds[cell, 3] == 1 + (*WORDS, *NUMBERS).index(scene.printed.text)
            width, _ = printed_half_size(scene.printed.text, scene.printed.height)
            far = (numbers[:, 0] - scene.printed.x).abs() > width + 1 / side
            assert not kinds[far, 3].any()
        else:
            assert not kinds[:, 3].any()
    assert 20 < found < 40


def test_symbols_stand_before_the_first_question_and_only_answers_count_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    scenes = list(islice(talks(0, 0), 3))
    batch = build_batch(scenes, tokenizer, 7, (True, False, True), 0.2)
    assert batch.symbols.sum(dim=1).tolist() == [49, 0, 49]
    assert batch.kinds.shape == (2, 49, 4)
    assert not batch.weights[batch.symbols].any()
    assert (batch.ids[batch.symbols] == tokenizer.pad_token_id).all()
    for row, (_, turns) in enumerate(scenes):
        answers = batch.ids[row][batch.weights[row] == 1.0]
        assert tokenizer.decode(answers) == "".join(f" {said}</s>" for _, said in turns)
    # Where the symbols stand, the model reads the eye; nowhere else.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    eye = SymbolicEye(model.config.hidden_size)
    loss, right = compute_loss(model, eye, batch)
    loss.backward()
    assert 0 <= right <= 1
    whole = build_batch(scenes, tokenizer, 7, (True, False, True), 1.0)
    assert compute_loss(model, eye, whole)[1] == right  # of answers, whatever questions weigh
    assert all(table.weight.grad.abs().sum() > 0 for table in eye.tables)
    blind = build_batch(scenes, tokenizer, 7, (False,) * 3, 0.2)
    assert not blind.symbols.any()
    assert torch.isfinite(compute_loss(model, eye, blind)[0])


def test_the_recipe_trains_and_its_result_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["model.width=32", "model.mlp_width=48", "model.depth=1", "model.heads=2", "model.vocabulary=300"]
    small = ["steps=4", "batch_size=2", "grids=[3]", "tokenizer_scenes=4", "final_scenes=2", "warmup_steps=1"]
    config = tmp_path / "c.yaml"
    config.write_text(f"out: {tmp_path / 'llama'}\n")
    assert main([str(config), *tiny, *small]) == 0
    result = json.loads((tmp_path / "llama" / "result.json").read_text())
    assert result["conversations_seen"] == 4 * 2
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
    config.write_text("steps: 4\nsteps: 0\n")
    assert main([str(config)]) == 1
    assert "c.yaml is not valid YAML: " in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["question_weight", "lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_rates_and_weights_are_numbers_of_0_or_more(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be a number of 0 or more"):
        TrainLlamaConfig(**{setting: value})


def test_there_is_a_grid() -> None:
    with pytest.raises(ValueError, match=r"grids \(one or more\)"):
        TrainLlamaConfig(grids=())


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_model_of_no_numbers_is_not_saved(
    steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["model.width=32", "model.mlp_width=48", "model.depth=1", "model.heads=2", "model.vocabulary=300"]
    small = ["batch_size=2", "grids=[3]", "tokenizer_scenes=4", "final_scenes=2", "warmup_steps=1"]
    config = tmp_path / "c.yaml"
    config.write_text(f"out: {tmp_path / 'llama'}\n")
    assert main([str(config), *tiny, *small, f"steps={steps}", "lr=1e30"]) == 1
    assert "lower lr" in capsys.readouterr().err
    assert not (tmp_path / "llama").exists()


def test_the_shipped_model_knows_the_words_of_scenes() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "scenes" / "llama.yaml").read_text())
    config = build_settings(TrainLlamaConfig, settings, (), "llama.yaml")
    assert AutoModelForCausalLM.from_pretrained(SHIPPED).config.hidden_size == config.model.width
    # An untrained model stands at ln(512) = 6.2; unforeseeable answers and choices of words cost about 0.6.
    assert measure_loss(SHIPPED, config, 20) < 0.9
    weights = sum(path.stat().st_size for path in SHIPPED.iterdir())
    assert weights < 4e6
