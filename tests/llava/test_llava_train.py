"""LLaVA's own training on an encoder directory, one process: three stages, reload, generation."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("llava", reason="LLaVA is not installed; see make test-llava")

if TYPE_CHECKING:
    from .conftest import Lab

ASK = "<image>\nWhat colour is it?"
LORA = ("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "2e-3")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def pretrained(lab: Lab) -> Path:
    """Projector pre-training, as a real command line through the launcher."""
    command = ("-m", "llm_integration.llava", "-m", "llava.train.train")
    lab.run(*command, *lab.flags("llava-pretrain", "--tune_mm_mlp_adapter", "True", "--version", "plain"))
    return lab.folder / "llava-pretrain"


@pytest.fixture(scope="module")
def tuned(lab: Lab, pretrained: Path) -> Path:
    """Full fine-tuning with the tower, saving a checkpoint on the way."""
    adapter = str(pretrained / "mm_projector.bin")
    more = ("--unfreeze_mm_vision_tower", "True", "--save_strategy", "steps", "--save_steps", "1")
    lab.train("llava-tuned", "--pretrain_mm_mlp_adapter", adapter, "--gradient_checkpointing", "True", *more)
    return lab.folder / "llava-tuned"


@pytest.fixture(scope="module")
def lora(lab: Lab, pretrained: Path) -> Path:
    """LoRA fine-tuning with a frozen tower."""
    lab.train("llava-lora", "--pretrain_mm_mlp_adapter", str(pretrained / "mm_projector.bin"), *LORA)
    return lab.folder / "llava-lora"


def check_losses(lab: Lab, folder: Path) -> None:
    losses = lab.losses(folder.name)
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses), losses


def test_pretraining_trains_the_projector_only(lab: Lab, pretrained: Path) -> None:
    import torch

    check_losses(lab, pretrained)
    names = set(torch.load(pretrained / "mm_projector.bin"))
    assert names == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    config = read_config(pretrained)
    assert config["mm_vision_tower"] == str(lab.encoder)
    assert config["mm_hidden_size"] == 64
    assert not (pretrained / "vision_tower").exists()


def test_tuning_passes_gradients_to_the_tower(lab: Lab, tuned: Path) -> None:
    import torch

    import sparse_vlm

    check_losses(lab, tuned)
    before = sparse_vlm.load_encoder(lab.encoder).state_dict()
    after = sparse_vlm.load_encoder(tuned / "vision_tower").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for name in (
        "stem.conv.weight", "focusing.initial_rois", "focusing.stage.mixing.generator_out.weight",
        "focusing.stage.adjust.weight", "cortex.blocks.0.attn.qkv.weight", "head.norm.weight",
    ):  # fmt: skip
        assert name in changed, name
    assert json.loads((tuned / "vision_tower" / "provenance.json").read_text())["tuned_from"] == "encoder"


@pytest.mark.parametrize("name", ["", "checkpoint-1", "checkpoint-2"])
def test_every_checkpoint_names_the_tower_it_was_trained_with(tuned: Path, name: str) -> None:
    import torch
    from safetensors.torch import load_file

    import sparse_vlm
    from llm_integration.llava.directories import read_fingerprint

    folder = tuned / name
    config = read_config(folder)
    assert config["mm_vision_tower"] == str(folder / "vision_tower")
    assert config["mm_vision_tower_sha256"] == read_fingerprint(folder / "vision_tower")
    prefix = "model.vision_tower.encoder."
    inside = {
        key.removeprefix(prefix): value
        for key, value in load_file(str(folder / "model.safetensors")).items()
        if key.startswith(prefix)
    }
    beside = sparse_vlm.load_encoder(folder / "vision_tower").state_dict()
    assert inside.keys() == beside.keys()
    assert all(torch.equal(inside[key], beside[key]) for key in inside)


def test_lora_stays_out_of_the_tower(lab: Lab, lora: Path) -> None:
    import torch
    from safetensors.torch import load_file

    check_losses(lab, lora)
    adapter = load_file(str(lora / "adapter_model.safetensors"))
    others = torch.load(lora / "non_lora_trainables.bin")
    assert any(".layers.1.mlp.down_proj.lora_B" in name for name in adapter)
    assert others
    assert all("mm_projector" in name for name in others)
    assert not any("vision_tower" in name for name in (*adapter, *others))


def load(folder: str, base: str | None) -> tuple[Any, Any, Any]:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        folder, base, get_model_name_from_path(folder), device="cpu"
    )
    return tokenizer, model.float(), processor


def generate(folder: str, base: str | None, picture: str, tower: str, out: str | None = None) -> None:
    """LLaVA's own loading and generation; checks the tower, merges and saves if asked to."""
    import torch
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    import sparse_vlm
    from llm_integration.llava import plugged_in

    with plugged_in():
        tokenizer, model, processor = load(folder, base)
    expected = sparse_vlm.load_encoder(tower).state_dict()
    found = model.get_vision_tower().encoder.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key].float(), found[key]) for key in found)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    images = process_images([Image.open(picture)], processor, model.config)
    tokens = tokenizer_image_token("USER: " + ASK + " ASSISTANT:", tokenizer, return_tensors="pt")[None]
    with torch.inference_mode():
        seen = [
            model.generate(
                tokens, images=batch, do_sample=False, max_new_tokens=5, min_new_tokens=5,
                output_scores=True, return_dict_in_generate=True,
            )
            for batch in (images, -images)
        ]  # fmt: skip
    assert len(seen[0].scores) == 5
    assert not torch.equal(seen[0].scores[0], seen[1].scores[0]), "the picture makes no difference"
    if out is not None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def test_a_projector_checkpoint_reloads_on_its_language_model(lab: Lab, pretrained: Path) -> None:
    lab.fork(generate, str(pretrained), str(lab.llm), str(lab.pictures / "0.png"), str(lab.encoder))


def test_a_tuned_checkpoint_reloads_with_its_tuned_tower(lab: Lab, tuned: Path) -> None:
    lab.fork(generate, str(tuned), None, str(lab.pictures / "0.png"), str(tuned / "vision_tower"))


def test_a_moved_checkpoint_takes_its_tower_along(lab: Lab, tuned: Path) -> None:
    moved = lab.folder / "elsewhere" / "llava-tuned"
    shutil.copytree(tuned, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    hidden = tuned.rename(tuned.with_name("hidden"))
    try:
        lab.fork(generate, str(moved), None, str(lab.pictures / "0.png"), str(moved / "vision_tower"))
    finally:
        hidden.rename(tuned)


def test_lora_merges_and_the_merged_model_reloads(lab: Lab, lora: Path) -> None:
    picture, merged = str(lab.pictures / "0.png"), str(lab.folder / "llava-merged")
    lab.fork(generate, str(lora), str(lab.llm), picture, str(lab.encoder), merged)
    assert not (Path(merged) / "adapter_config.json").exists()
    lab.fork(generate, merged, None, picture, str(lab.encoder))


def test_model_vqa_loader_answers_in_a_fresh_process(lab: Lab, tuned: Path) -> None:
    # LLaVA's script says device="cuda" and half precision; a script in front of it maps both to the CPU.
    script = lab.folder / "vqa_on_cpu.py"
    script.write_text(
        "import runpy, torch\n"
        "to = torch.Tensor.to\n"
        "def on_cpu(self, *args, **kwargs):\n"
        "    kwargs = {k: 'cpu' if v == 'cuda' else v for k, v in kwargs.items()}\n"
        "    return to(self, *args, **kwargs)\n"
        "torch.Tensor.to = on_cpu\n"
        "runpy.run_module('llava.eval.model_vqa_loader', run_name='__main__', alter_sys=True)\n"
    )
    questions, answers = lab.folder / "questions.jsonl", lab.folder / "answers" / "answers.jsonl"
    lines = [{"question_id": i, "image": f"{i}.png", "text": "What colour is it?"} for i in range(3)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    lab.run(
        "-m", "llm_integration.llava", str(script), "--model-path", str(tuned), "--image-folder",
        str(lab.pictures), "--question-file", str(questions), "--answers-file", str(answers),
        "--temperature", "0", "--conv-mode", "vicuna_v1", "--max_new_tokens", "4",
    )  # fmt: skip
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["question_id"] for line in found] == [0, 1, 2]


def test_continuing_with_another_tower_is_refused(lab: Lab, tuned: Path) -> None:
    output = lab.train("llava-swapped", llm=str(tuned), fails=True)
    assert "this checkpoint was trained with the vision tower" in output
    assert f"pass --vision_tower {tuned}" in output


def test_without_the_plug_training_stops_instead_of_using_a_random_clip(lab: Lab) -> None:
    output = lab.train("llava-unplugged", "--tune_mm_mlp_adapter", "True", plugged=False, fails=True)
    assert "not a CLIP checkpoint" in output
    assert not (lab.folder / "llava-unplugged" / "mm_projector.bin").exists()


def test_anyres_tiles_with_the_flat_merge(lab: Lab) -> None:
    lab.fork(anyres, str(lab.encoder), str(lab.llm), str(lab.pictures / "7.png"))


def anyres(encoder: str, llm: str, picture: str) -> None:
    """Four tiles and the whole picture: 5 x 49 tokens in the place of one image mark."""
    from types import SimpleNamespace

    import torch
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images
    from llava.model import LlavaLlamaForCausalLM
    from PIL import Image

    from llm_integration.llava import plugged_in

    values = SimpleNamespace(
        vision_tower=encoder, mm_vision_select_layer=-1, mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None, mm_patch_merge_type="flat", mm_projector_type="linear",
    )  # fmt: skip
    with plugged_in():
        model = LlavaLlamaForCausalLM.from_pretrained(llm)
        model.get_model().initialize_vision_modules(values)
    model.config.image_aspect_ratio = "anyres"
    model.config.image_grid_pinpoints = [[128, 128]]
    processor = model.get_vision_tower().image_processor
    tiles = process_images([Image.open(picture), Image.new("RGB", (60, 60))], processor, model.config)
    assert tiles.shape == (2, 5, 3, 64, 64)
    tokens = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6]] * 2)
    for images in (tiles, list(tiles)):
        _, _, _, _, embeddings, _ = model.prepare_inputs_labels_for_multimodal(
            tokens, None, None, None, None, images, image_sizes=[(150, 72), (60, 60)]
        )
        assert embeddings.shape == (2, 3 + 5 * 49, 64)
    assert sys.modules["llava.model.llava_arch"].build_vision_tower.__module__.startswith("llava.")
