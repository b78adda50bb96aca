"""LLaVA's own training on an encoder directory, one process: three stages, reload, generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("llava", reason="LLaVA is not installed; see make test-llava")

if TYPE_CHECKING:
    from .conftest import Lab

UNFREEZE = ("--unfreeze_mm_vision_tower", "True")
LORA = ("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8", "--mm_projector_lr", "2e-3")


@pytest.fixture(scope="module")
def pretrained(lab: Lab) -> Path:
    """Projector pre-training, as a real command line through the launcher."""
    command = ("-m", "llm_integration.llava", "-m", "llava.train.train")
    more = ("--tune_mm_mlp_adapter", "True", "--version", "plain", *lab.cpu)
    lab.run(*command, *lab.flags("llava-pretrain", *more))
    return lab.folder / "llava-pretrain"


@pytest.fixture(scope="module")
def tuned(lab: Lab, pretrained: Path) -> Path:
    """Full fine-tuning with the tower, saving a checkpoint on the way."""
    adapter = ("--pretrain_mm_mlp_adapter", str(pretrained / "mm_projector.bin"))
    more = (*UNFREEZE, "--gradient_checkpointing", "True", "--save_strategy", "steps", "--save_steps", "1")
    lab.train("llava-tuned", *adapter, *more)
    return lab.folder / "llava-tuned"


@pytest.fixture(scope="module")
def lora(lab: Lab, pretrained: Path) -> Path:
    """LoRA fine-tuning with a frozen tower, with LLaVA's usual flags for its data."""
    adapter = ("--pretrain_mm_mlp_adapter", str(pretrained / "mm_projector.bin"))
    data = ("--image_aspect_ratio", "pad", "--group_by_modality_length", "True")
    lab.train("llava-lora", *adapter, *data, *LORA)
    return lab.folder / "llava-lora"


def test_pretraining_trains_the_projector_only(lab: Lab, pretrained: Path) -> None:
    import torch

    lab.check_losses(pretrained.name)
    names = set(torch.load(pretrained / "mm_projector.bin"))
    assert names == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    config = json.loads((pretrained / "config.json").read_text())
    assert config["mm_vision_tower"] == str(lab.encoder)
    assert config["mm_hidden_size"] == 64
    assert not (pretrained / "vision_tower").exists()


@pytest.mark.parametrize("name", ["", "checkpoint-1", "checkpoint-2"])
def test_tuning_changes_the_tower_and_every_checkpoint_names_its_own(
    lab: Lab, tuned: Path, name: str
) -> None:
    lab.check_losses(tuned.name)
    lab.check_tuned(tuned / name, lab.encoder)
    provenance = json.loads((tuned / name / "vision_tower" / "provenance.json").read_text())
    assert provenance["tuned_from"] == "encoder"


def test_lora_stays_out_of_the_tower(lab: Lab, lora: Path) -> None:
    import torch
    from safetensors.torch import load_file

    lab.check_losses(lora.name)
    adapter = load_file(str(lora / "adapter_model.safetensors"))
    others = torch.load(lora / "non_lora_trainables.bin")
    assert any(".layers.1.mlp.down_proj.lora_B" in name for name in adapter)
    assert others
    assert all("mm_projector" in name for name in others)
    assert not any("vision_tower" in name for name in (*adapter, *others))


def test_a_projector_checkpoint_reloads_on_its_language_model(lab: Lab, pretrained: Path) -> None:
    lab.generate(pretrained, lab.encoder, base=lab.llm)


def test_without_the_plug_a_checkpoint_does_not_load(lab: Lab, pretrained: Path) -> None:
    output = lab.generate(pretrained, lab.encoder, base=lab.llm, plugged=False, fails=True)
    assert "this directory holds a SparseFormer of sparse_vlm, not a CLIP checkpoint" in output


def test_a_tuned_checkpoint_reloads_with_its_tuned_tower(lab: Lab, tuned: Path) -> None:
    lab.generate(tuned, tuned / "vision_tower")


def test_a_moved_checkpoint_takes_its_tower_along(lab: Lab, tuned: Path) -> None:
    moved = lab.folder / "elsewhere" / "llava-tuned"
    shutil.copytree(tuned, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    hidden = tuned.rename(tuned.with_name("hidden"))
    try:
        lab.generate(moved, moved / "vision_tower")
    finally:
        hidden.rename(tuned)


def test_lora_merges_and_the_merged_model_reloads(lab: Lab, lora: Path) -> None:
    merged = lab.folder / "llava-merged"
    # device_map="cpu" is how LLaVA's merge_lora_weights.py calls its loader.
    lab.generate(lora, lab.encoder, base=lab.llm, out=str(merged), device_map="cpu")
    assert not (merged / "adapter_config.json").exists()
    lab.generate(merged, lab.encoder)


def test_lora_beside_a_tuned_tower(lab: Lab, pretrained: Path) -> None:
    from safetensors.torch import load_file

    adapter = str(pretrained / "mm_projector.bin")
    lab.train("llava-tuned-lora", "--pretrain_mm_mlp_adapter", adapter, *UNFREEZE, *LORA)
    lab.check_losses("llava-tuned-lora")
    folder, merged = lab.folder / "llava-tuned-lora", lab.folder / "llava-tuned-merged"
    lab.check_tuned(folder, lab.encoder)
    assert not any("vision_tower" in name for name in load_file(str(folder / "adapter_model.safetensors")))
    lab.generate(folder, folder / "vision_tower", base=lab.llm, out=str(merged), device_map="cpu")
    lab.generate(merged, folder / "vision_tower")


def test_training_goes_on_from_a_checkpoint_with_its_tuned_tower(lab: Lab, tuned: Path) -> None:
    tower = str(tuned / "vision_tower")
    lab.train("llava-again", *UNFREEZE, llm=str(tuned), tower=tower)
    lab.check_tuned(lab.folder / "llava-again", tuned / "vision_tower")
    lab.train("llava-frozen-again", llm=str(tuned), tower=tower)
    assert not (lab.folder / "llava-frozen-again" / "vision_tower").exists()
    lab.generate(lab.folder / "llava-frozen-again", tuned / "vision_tower")


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


def test_training_resumes_with_the_tower_it_had(lab: Lab, tuned: Path) -> None:
    resumed = lab.folder / "llava-resumed"
    shutil.copytree(tuned / "checkpoint-1", resumed / "checkpoint-1")
    lab.train("llava-resumed", *UNFREEZE, "--gradient_checkpointing", "True")
    assert lab.check_losses("llava-resumed") == lab.losses(tuned.name)
    lab.check_tuned(resumed, tuned / "checkpoint-1" / "vision_tower")
    lab.check_same_tower(resumed / "vision_tower", tuned / "vision_tower")
