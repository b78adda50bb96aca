"""LLaVA's own training through the launchers: deepspeed with ZeRO-2 and ZeRO-3, and torchrun."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("llava", reason="LLaVA is not installed; see make test-llava")

if TYPE_CHECKING:
    from .conftest import Lab

# LLaVA synchronises CUDA before it saves under DeepSpeed; on a CPU there is nothing to synchronise.
TRAIN_ON_CPU = """
import torch
torch.cuda.synchronize = lambda *args: None
from llava.train.train import train
train()
"""


def write_json(lab: Lab, stage: int) -> str:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = 500000
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": 100000, "stage3_param_persistence_threshold": 0}
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    values = {
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": zero,
    }
    path = lab.folder / f"zero{stage}.json"
    path.write_text(json.dumps(values))
    return str(path)


def launch(lab: Lab, stage: int, out: str, *more: str) -> Path:
    script = lab.folder / "train_on_cpu.py"
    script.write_text(TRAIN_ON_CPU)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What the `deepspeed` command runs.
    lab.run(
        "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", port, "--module",
        "llm_integration.llava", str(script), "--deepspeed", write_json(lab, stage), *lab.flags(out, *more),
        DS_ACCELERATOR="cpu", LOCAL_SIZE="1",
    )  # fmt: skip
    losses = lab.losses(out)
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses), losses
    return lab.folder / out


def test_zero_2_pretraining(lab: Lab) -> None:
    import torch

    folder = launch(lab, 2, "llava-zero2", "--tune_mm_mlp_adapter", "True")
    weights = torch.load(folder / "mm_projector.bin")
    assert weights
    assert all("mm_projector" in name and value.numel() for name, value in weights.items())


def test_zero_3_tunes_the_tower_and_saves_it_whole(lab: Lab) -> None:
    import torch

    import sparse_vlm
    from llm_integration.llava.directories import read_fingerprint

    folder = launch(lab, 3, "llava-zero3", "--unfreeze_mm_vision_tower", "True")
    before = sparse_vlm.load_encoder(lab.encoder, dtype=torch.bfloat16).state_dict()
    after = sparse_vlm.load_encoder(folder / "vision_tower").state_dict()  # strict: no size-0 weights
    for name in ("stem.conv.weight", "focusing.initial_rois", "cortex.blocks.1.mlp.fc2.weight"):
        assert after[name].shape == before[name].shape
        assert not torch.equal(after[name], before[name]), name
    config = json.loads((folder / "config.json").read_text())
    assert config["mm_vision_tower"] == str(folder / "vision_tower")
    assert config["mm_vision_tower_sha256"] == read_fingerprint(folder / "vision_tower")


def test_torchrun_reaches_llavas_command(lab: Lab) -> None:
    script = lab.folder / "probe.py"
    script.write_text(
        "import os, sys\n"
        "from llm_integration.llava import is_plugged_in\n"
        "print('probe', os.environ['LOCAL_RANK'], sys.argv[1:], is_plugged_in())\n"
    )
    output = lab.run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m",
        "llm_integration.llava", str(script), "--lr", "1",
    )  # fmt: skip
    assert "probe 0 ['--lr', '1'] True" in output
