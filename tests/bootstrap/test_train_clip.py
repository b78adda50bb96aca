"""The recipe of the small CLIP: a tiny run from command line to open_clip's own loaders."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file

from bootstrap.scenes.clip_eval import class_embeddings, zero_shot_accuracy
from bootstrap.scenes.clip_model import WEIGHTS, ClipModelConfig, build_clip, enlarge, open_clip_config
from bootstrap.scenes.clip_texts import CLASS_TEMPLATES, prompt_groups, vocabulary, write_tokenizer
from bootstrap.scenes.draw import draw_scene
from bootstrap.scenes.scene import build_scene
from bootstrap.scenes.text import caption
from bootstrap.scenes.vocabulary import ALL_PAIRS, CLASS_NAMES, HELDOUT_PAIRS, SHAPES
from bootstrap.train_clip import (
    Phase,
    TrainClipConfig,
    build_batch,
    enter_phase,
    main,
    prompt_loss,
    prompt_targets,
    take_color_away,
)
from sparse_vlm.settings import build_settings

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "assets" / "scenes_clip"
TINY = ClipModelConfig(
    embed_dim=16, image_size=32, width=16, layers=1, head_width=8, text_width=16, text_layers=1, text_heads=2
)


@pytest.fixture
def tokenize(tmp_path: Path):
    write_tokenizer(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(ClipModelConfig())))
    return open_clip.get_tokenizer(f"local-dir:{tmp_path}")


def test_tokenizer_knows_every_word_of_every_caption(tokenize):
    unknown, end = vocabulary().index("<unknown>"), len(vocabulary()) - 1
    texts = [caption(build_scene(0, index, split)) for index in range(150) for split in ("train", "heldout")]
    texts += [text for group in prompt_groups(random.Random(0)).values() for text in group]
    ids = tokenize(texts)
    assert ids.shape == (len(texts), ClipModelConfig().context_length)
    assert not (ids == unknown).any()
    # open_clip reads the text feature at the largest id, so that must be the end mark, once, uncut.
    assert ((ids == end).sum(1) == 1).all()
    assert ids.max() == end
    assert (tokenize(["a zebra"]) == unknown).any()


def test_no_prompt_names_a_heldout_pair():
    heldout = {f"{color} {shape}" for shape, color in HELDOUT_PAIRS}
    for seed in range(6):
        texts = [text for group in prompt_groups(random.Random(seed)).values() for text in group]
        assert not [text for text in texts for name in heldout if name in text]
    assert "pair" not in prompt_groups(random.Random(0), pairs=False)


def test_prompt_targets_point_at_true_texts():
    scenes = [build_scene(0, index) for index in range(20)]
    groups = prompt_groups(random.Random(1))
    targets = prompt_targets(scenes)
    for position, scene in enumerate(scenes):
        assert scene.main.name in groups["pair"][targets["pair"][position]]
        for attribute in ("color", "shape", "texture"):
            assert getattr(scene.main, attribute) in groups[attribute][targets[attribute][position]]


def test_grey_pictures_lose_their_color_in_picture_text_and_target():
    config = TrainClipConfig(batch_size=5, phases=(Phase(1, 32),), model=TINY)
    pixels, captions, scenes = build_batch(config, 0)
    images, words = take_color_away(pixels.float(), captions, 2)
    targets = prompt_targets(scenes, 2)
    for row, scene in enumerate(scenes):
        grey = row % 2 == 0
        assert bool((images[row, 0] == images[row, 1]).all()) == grey
        assert (scene.main.color in words[row].split()) != grey
        assert scene.main.shape in words[row]
        assert (targets["color"][row].item() == -100) == (targets["pair"][row].item() == -100) == grey
        assert targets["shape"][row] == SHAPES.index(scene.main.shape)
    untouched, same = take_color_away(pixels.float(), captions, 0)
    assert torch.equal(untouched, pixels.float())
    assert same == captions


def test_prompt_loss_is_the_mean_cross_entropy_of_the_groups():
    images, texts = torch.eye(4)[:2], torch.eye(4)
    sizes = {"color": 1, "shape": 3}
    targets = {"color": torch.tensor([0, 0]), "shape": torch.tensor([0, 0])}
    logits = 5.0 * torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    expected = torch.nn.functional.cross_entropy(logits, targets["shape"]) / 2
    torch.testing.assert_close(prompt_loss(images, texts, sizes, targets, torch.tensor(5.0)), expected)


def test_a_batch_is_a_function_of_seed_and_step():
    config = TrainClipConfig(batch_size=3, phases=(Phase(1, 32),), model=TINY)
    images, captions, scenes = build_batch(config, 5)
    again, _, _ = build_batch(config, 5)
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images, again)
    assert captions == [caption(scene) for scene in scenes]
    assert [scene.index for scene in scenes] == [15, 16, 17]
    red, green, blue = draw_scene(scenes[1], 32).getpixel((4, 9))  # x, y
    assert images[1, :, 9, 4].tolist() == [red, green, blue]


def test_the_larger_model_continues_the_smaller():
    torch.manual_seed(0)
    small, large = build_clip(TINY, 16), build_clip(TINY)
    state = enlarge(small.state_dict(), large)
    large.load_state_dict(state)
    table = state["visual.positional_embedding"]
    assert table.shape == (17, 16)
    torch.testing.assert_close(table[0], small.visual.positional_embedding[0])
    # Stretching keeps the order: corners stay nearest to their corners.
    corners = small.visual.positional_embedding[1:].detach()
    for place, corner in zip((0, 3, 12, 15), range(4), strict=True):
        assert torch.cdist(table[1:][place][None], corners).argmin() == corner


def tiny_run(tmp_path: Path, *overrides: str) -> int:
    recipe = {
        "phases": [
            {"steps": 2, "image_size": 16},
            {"steps": 1, "image_size": 32, "patch_dropout": 0.5},
            {"steps": 1, "image_size": 32},
        ],
        "batch_size": 4,
        "eval_every": 3,
        "eval_pictures": 4,
        "final_pictures": 6,
        "warmup_steps": 1,
        "threads": torch.get_num_threads(),
        "model": {
            name: getattr(TINY, name) for name in ("embed_dim", "image_size", "width", "layers", "head_width")
        }
        | {"text_width": 16, "text_layers": 1, "text_heads": 2},
    }
    path = tmp_path / "clip.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return main([str(path), f"out={tmp_path / 'out'}", *overrides])


def test_a_tiny_run_loads_through_open_clip(tmp_path: Path):
    assert tiny_run(tmp_path) == 0
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert result["pictures_seen"] == 16
    assert set(result["zero_shot"]) == {"valid", "heldout"}
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    assert preprocess(draw_scene(build_scene(0, 0), 32)).shape == (3, 32, 32)
    classes = class_embeddings(model, open_clip.get_tokenizer(f"local-dir:{out}"), CLASS_TEMPLATES)
    assert classes.shape == (len(ALL_PAIRS), 16)
    torch.testing.assert_close(classes.norm(dim=-1), torch.ones(len(ALL_PAIRS)))
    zeroshot = json.loads((out / "zeroshot.json").read_text())
    assert zeroshot["classes"] == list(CLASS_NAMES)
    named = {CLASS_NAMES[index] for index in zeroshot["heldout_classes"]}
    assert named == {f"{color} {shape}" for shape, color in HELDOUT_PAIRS}


def test_a_run_goes_on_from_an_earlier_result(tmp_path: Path):
    assert tiny_run(tmp_path) == 0
    before = load_file(tmp_path / "out" / WEIGHTS)
    more = [f"start={tmp_path / 'out'}", 'phases=[{"steps": 1, "image_size": 32}]', "lr=0.0"]
    assert tiny_run(tmp_path, *more, f"out={tmp_path / 'next'}") == 0
    after = load_file(tmp_path / "next" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_patches_are_dropped_only_where_the_phase_says():
    config = TrainClipConfig(phases=(Phase(1, 32),), model=TINY)
    model = build_clip(TINY)
    model, optimizer = enter_phase(Phase(1, 32, 0.5), config, model, None)
    seen: list[int] = []
    model.visual.transformer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model.encode_image(torch.zeros(2, 3, 32, 32))
    model, again = enter_phase(Phase(1, 32), config, model, optimizer)
    model.encode_image(torch.zeros(2, 3, 32, 32))
    assert seen == [1 + 8, 1 + 16]
    assert again is optimizer


def test_bad_recipes_end_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert tiny_run(tmp_path, "leaning_rate=1") == 1
    assert "leaning_rate" in capsys.readouterr().err
    assert tiny_run(tmp_path, 'phases=[{"steps": 1, "image_size": 16}]') == 1
    assert "last phase must train at model.image_size (32" in capsys.readouterr().err
    assert tiny_run(tmp_path, 'phases=[{"steps": 1, "image_size": 24}, {"steps": 1, "image_size": 32}]') == 1
    assert "must divide" in capsys.readouterr().err
    assert tiny_run(tmp_path, f"start={tmp_path / 'nowhere'}") == 1
    assert "at 32 pixels" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.yaml")]) == 1
    assert "missing.yaml" in capsys.readouterr().err
    for content, complaint in (
        (b"batch_size: 4\nbatch_size: 1\n", "'batch_size' is there twice"),
        (b"# \xff\n", "utf-8"),
    ):
        (tmp_path / "bad.yaml").write_bytes(content)
        assert main([str(tmp_path / "bad.yaml")]) == 1
        error = capsys.readouterr().err
        assert "bad.yaml is not valid YAML: " in error
        assert complaint in error


def test_the_recipe_in_configs_describes_the_shipped_weights():
    shipped = json.loads((ASSETS / "open_clip_config.json").read_text())
    assert shipped == json.loads(json.dumps(open_clip_config(ClipModelConfig())))
    path = ROOT / "configs" / "scenes" / "clip.yaml"
    assert build_settings(TrainClipConfig, yaml.safe_load(path.read_text())).model == ClipModelConfig()
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= 15_000_000


def test_shipped_weights_name_what_they_never_saw():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{ASSETS}")
    model.eval()
    zeroshot = json.loads((ASSETS / "zeroshot.json").read_text())
    tokenizer = open_clip.get_tokenizer(f"local-dir:{ASSETS}")
    classes = class_embeddings(model, tokenizer, zeroshot["templates"])
    figures = zero_shot_accuracy(model, preprocess, classes, "heldout", seed=77, count=40, size=96)
    # Chance is 1/64; the model card has the measured figures. A broken tokenizer or transform fails here.
    assert figures["accuracy"] >= 0.15
    assert figures["color_accuracy"] >= 0.85


@pytest.mark.parametrize("setting", ["eval_every", "warmup_steps", "final_pictures", "threads"])
def test_counts_that_are_divided_by_are_not_zero(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}.* must be at least 1"):
        TrainClipConfig(**{setting: 0})


@pytest.mark.parametrize("setting", ["lr", "weight_decay", "prompt_weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_rates_and_weights_are_numbers_of_0_or_more(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be a number of 0 or more"):
        TrainClipConfig(**{setting: value})


def test_a_phase_has_pictures_of_a_size() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        Phase(1, 0)
