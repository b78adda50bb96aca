"""LLaVA's own training through the launchers: deepspeed with ZeRO-2 and ZeRO-3, and torchrun.

One run of each launcher and stage is the real command line, two processes; the others are forks that get
what the launcher would have given them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("llava", reason="LLaVA is not installed; see make test-llava")

if TYPE_CHECKING:
    from .conftest import Lab

UNFREEZE = ("--unfreeze_mm_vision_tower", "True")
LORA = ("--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8")
PRETRAIN = ("--tune_mm_mlp_adapter", "True", "--version", "plain")


def launch(lab: Lab, stage: int, out: str, *more: str) -> Path:
    """``deepspeed --num_gpus 2 --module llm_integration.llava SCRIPT ...``."""
    script = lab.folder / "train_on_cpu.py"
    script.write_text(lab.on_cpu + "from llava.train.train import train\ntrain()\n")
    # This module is what the `deepspeed` command runs.
    output = lab.run(
        "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", lab.find_port(), "--module",
        "llm_integration.llava", str(script), *lab.zero(stage), *lab.flags(out, *more),
        LOCAL_SIZE="2",
    )  # fmt: skip
    lab.check_zero(output, stage)
    lab.check_losses(out)
    return lab.folder / out


@pytest.fixture(scope="module")
def zero3(lab: Lab) -> Path:
    """Fine-tuning with the tower under ZeRO-3, its checkpoint too."""
    return launch(lab, 3, "llava-zero3", *UNFREEZE, "--save_strategy", "steps", "--save_steps", "2")


def check_projector(folder: Path) -> None:
    import torch

    weights = torch.load(folder / "mm_projector.bin")
    assert set(weights) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert all(value.numel() for value in weights.values())


def test_deepspeed_zero_2_pretraining(lab: Lab) -> None:
    folder = launch(lab, 2, "llava-zero2", *PRETRAIN)
    check_projector(folder)
    lab.generate(folder, lab.encoder, base=lab.llm)


@pytest.mark.parametrize("name", ["", "checkpoint-2"])
def test_deepspeed_zero_3_tunes_the_tower_and_saves_it_whole(lab: Lab, zero3: Path, name: str) -> None:
    from safetensors.torch import load_file

    folder = zero3 / name
    lab.check_tuned(folder, lab.encoder)  # read strictly: a size-0 weight is an error
    weights = load_file(str(folder / "model.safetensors"))
    assert len(weights) > 50
    assert all(value.numel() for value in weights.values())


def test_a_model_tuned_under_zero_3_reloads_and_generates(lab: Lab, zero3: Path) -> None:
    lab.generate(zero3, zero3 / "vision_tower")


def test_a_tower_is_put_together_weight_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several weights at once this DeepSpeed awaits only the last; the others are whole by luck."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from deepspeed import zero

    from llm_integration.llava.tuned import _gathered

    asked: list[list[object]] = []

    def gather(weights: list[object]) -> nullcontext[None]:
        asked.append(weights)
        return nullcontext()

    monkeypatch.setattr(zero, "GatheredParameters", gather)
    partitioned = [SimpleNamespace(ds_id=number) for number in range(3)]
    with _gathered([*partitioned, SimpleNamespace()]):
        assert asked == [[weight] for weight in partitioned]


def test_zero_3_goes_on_from_its_checkpoint(lab: Lab, zero3: Path) -> None:
    before = lab.losses(zero3.name)
    lab.train(zero3.name, *UNFREEZE, "--max_steps", "3", zero=3, ranks=2)
    assert lab.check_losses(zero3.name, steps=3)[:2] == before
    lab.check_tuned(zero3, zero3 / "checkpoint-2" / "vision_tower")
    lab.generate(zero3, zero3 / "vision_tower")


def test_zero_3_starts_from_a_checkpoint_with_a_tower(lab: Lab, zero3: Path) -> None:
    tower = zero3 / "checkpoint-2" / "vision_tower"
    lab.train("llava-zero3-again", llm=str(zero3 / "checkpoint-2"), tower=str(tower), zero=3)
    lab.check_losses("llava-zero3-again")
    assert not (lab.folder / "llava-zero3-again" / "vision_tower").exists()
    lab.generate(lab.folder / "llava-zero3-again", tower)


def test_zero_3_pretraining(lab: Lab) -> None:
    lab.train("llava-zero3-projector", *PRETRAIN, zero=3)
    lab.check_losses("llava-zero3-projector")
    check_projector(lab.folder / "llava-zero3-projector")


def test_zero_2_tunes_the_tower(lab: Lab) -> None:
    lab.train("llava-zero2-tuned", *UNFREEZE, "--gradient_checkpointing", "True", zero=2)
    lab.check_losses("llava-zero2-tuned")
    folder = lab.folder / "llava-zero2-tuned"
    lab.check_tuned(folder, lab.encoder)
    lab.generate(folder, folder / "vision_tower")


@pytest.mark.parametrize(("stage", "more"), [(2, ()), (3, UNFREEZE)], ids=["frozen", "tuned"])
def test_lora_under_deepspeed_merges_and_reloads(lab: Lab, stage: int, more: tuple[str, ...]) -> None:
    lab.train(f"llava-zero{stage}-lora", *LORA, *more, zero=stage)
    lab.check_losses(f"llava-zero{stage}-lora")
    folder, merged = lab.folder / f"llava-zero{stage}-lora", lab.folder / f"llava-zero{stage}-merged"
    if more:
        lab.check_tuned(folder, lab.encoder)
    tower = folder / "vision_tower" if more else lab.encoder
    lab.generate(folder, tower, base=lab.llm, out=str(merged), device_map="cpu")
    lab.generate(merged, tower)


def test_torchrun_tunes_the_tower_in_two_processes(lab: Lab) -> None:
    lab.run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
        "llm_integration.llava", "-m", "llava.train.train", *lab.flags("llava-torchrun", *UNFREEZE),
        *lab.cpu, "--gradient_checkpointing", "True", "--ddp_backend", "gloo",
    )  # fmt: skip
    lab.check_losses("llava-torchrun")
    folder = lab.folder / "llava-torchrun"
    lab.check_tuned(folder, lab.encoder)
    config = json.loads((folder / "config.json").read_text())
    assert config["mm_vision_tower"] == str(folder / "vision_tower")
    lab.generate(folder, folder / "vision_tower")
