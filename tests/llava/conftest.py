"""A laboratory for an installed LLaVA: a tiny language model, a tiny encoder, pictures, and real commands.

Importing LLaVA and what it needs takes most of the time of a tiny run. So most runs happen in forks of one
process that has imported everything; one of each launcher and of each task for a fresh Python is a real
command line.
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _read(name: str) -> ModuleType:
    # By path: the tests' folder is not on the search path.
    spec = importlib.util.spec_from_file_location(f"llava_lab_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHILDREN, MATERIALS = _read("children"), _read("materials")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_DISABLED": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    # Resuming reads a random state of NumPy's, which torch from 2.6 refuses unless told otherwise.
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
}
# For runs without DeepSpeed; with it, this flag makes accelerate leave DeepSpeed out.
CPU = ("--use_cpu", "True")
# From every part of the encoder that the visual tokens depend on.
TUNED_WEIGHTS = (
    "stem.conv.weight", "focusing.initial_rois", "focusing.stage.mixing.generator_out.weight",
    "focusing.stage.adjust.weight", "cortex.blocks.0.attn.qkv.weight", "cortex.blocks.1.mlp.fc2.weight",
    "head.norm.weight",
)  # fmt: skip
PREFIX = "model.vision_tower.encoder."  # of the tower's weights in LLaVA's own files


@dataclass
class Lab:
    """Where everything lies."""

    folder: Path
    llm: Path
    encoder: Path
    pictures: Path
    captions: Path
    chats: Path
    forks: int = 0
    cpu = CPU
    on_cpu = CHILDREN.ON_CPU
    record = staticmethod(CHILDREN.record)

    def run(self, *command: str, python: str = sys.executable, **environment: str) -> str:
        """Run a Python command of this environment; its output, or a failed test with the end of it."""
        env = {
            **os.environ, **ENVIRONMENT, **environment, "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(
            [python, *command], cwd=self.folder, env=env, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def fork(self, function: Callable[..., Any], *arguments: Any, fails: bool = False) -> str:
        """Call a function in a process of its own, with everything imported; what it prints."""
        return self.wait([self.start(function, *arguments)], fails)

    def start(self, function: Callable[..., Any], *arguments: Any) -> tuple[BaseProcess, Path]:
        """Begin to call a function in a process of its own; the process, and where it prints to."""
        self.forks += 1
        log = self.folder / f"fork-{self.forks}.log"

        def child() -> None:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                sys.stdout = sys.stderr = file
                try:
                    function(*arguments)
                except BaseException:
                    traceback.print_exc()
                    raise SystemExit(1) from None

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        return process, log

    def wait(self, started: list[tuple[BaseProcess, Path]], fails: bool = False) -> str:
        """Wait for started processes; what they printed, or a failed test with the end of it."""
        while waiting := [process for process, _ in started if process.is_alive()]:
            if any(process.exitcode for process, _ in started):
                for process in waiting:  # it waits for one that died
                    process.kill()
            waiting[0].join(1)
        output = "\n".join(log.read_text() for _, log in started)
        codes = [process.exitcode for process, _ in started]
        assert any(codes) == fails, f"exit codes {codes}:\n{output[-6000:]}"
        return output

    def train(
        self, out: str, *more: str, plugged: bool = True, fails: bool = False, zero: int = 0, ranks: int = 1,
        **options: Any,
    ) -> str:  # fmt: skip
        """Run llava.train.train in forks: alone, or under DeepSpeed as its launcher would start them.

        Args:
            out: the output directory, below the laboratory's folder.
            more: further flags.
            plugged: whether through our launcher.
            fails: whether it has to end with an error.
            zero: the stage of ZeRO; 0 without DeepSpeed.
            ranks: how many processes; more than one with DeepSpeed only.
            options: see :meth:`flags`.
        """
        flags = self.flags(out, *more, **options)
        if not zero:
            return self.fork(CHILDREN.train, [*flags, *CPU], plugged, fails=fails)
        port = self.find_port()
        started = []
        for rank in range(ranks):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            given = [f"--local_rank={rank}", "-m", "llava.train.train", *self.zero(zero), *flags]
            started.append(self.start(CHILDREN.train_under_deepspeed, given, environment))
        output = self.wait(started, fails)
        self.check_zero(output, zero)
        return output

    def check_zero(self, output: str, stage: int) -> None:
        """DeepSpeed has to have taken part: a flag too many, and accelerate goes on without it."""
        assert f"DeepSpeed runs with ZeRO stage {stage}\n" in output, output[-3000:]

    def find_port(self) -> str:
        """A port nobody listens on."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return str(free.getsockname()[1])

    def zero(self, stage: int) -> list[str]:
        """LLaVA's flag for DeepSpeed and a configuration of a ZeRO stage, with buckets for a tiny model."""
        values: dict[str, Any] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
        values["reduce_bucket_size"] = 500000
        if stage == 3:
            values |= {"stage3_prefetch_bucket_size": 100000, "stage3_param_persistence_threshold": 0}
            values["stage3_gather_16bit_weights_on_model_save"] = True
        path = self.folder / f"zero{stage}.json"
        automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
        whole = {"bf16": {"enabled": "auto"}, "zero_optimization": values, **dict.fromkeys(automatic, "auto")}
        path.write_text(json.dumps(whole))
        return ["--deepspeed", str(path)]

    def check_losses(self, out: str, steps: int = 2) -> list[float]:
        """The logged losses, which have to be there, finite and positive."""
        losses = self.losses(out)
        assert len(losses) == steps
        assert all(math.isfinite(loss) and loss > 0 for loss in losses), losses
        return losses

    def check_tuned(self, folder: Path, before: Path) -> None:
        """A checkpoint's own tower has to be named by its config, to fit it, and to differ from another."""
        import torch
        from safetensors.torch import load_file

        import sparse_vlm
        from llm_integration.llava.directories import read_fingerprint

        tower = folder / "vision_tower"
        if (folder / "config.json").is_file():
            config = json.loads((folder / "config.json").read_text())
            assert config["mm_vision_tower"] == str(tower)
            assert config["mm_vision_tower_sha256"] == read_fingerprint(tower)
        old = sparse_vlm.load_encoder(before, dtype=torch.bfloat16).state_dict()
        new = sparse_vlm.load_encoder(tower, dtype=torch.bfloat16).state_dict()
        inside = folder / "model.safetensors"
        if inside.is_file():
            held = {
                key.removeprefix(PREFIX): value
                for key, value in load_file(str(inside)).items()
                if key.startswith(PREFIX)
            }
            assert held.keys() == new.keys()
            assert all(torch.equal(held[name].bfloat16(), new[name]) for name in new)
        for name in TUNED_WEIGHTS:
            assert not torch.equal(old[name], new[name]), f"{name} did not change"

    def check_same_tower(self, one: Path, other: Path) -> None:
        """Two encoder directories have to hold nearly the same weights."""
        import torch

        import sparse_vlm

        left = sparse_vlm.load_encoder(one).state_dict()
        right = sparse_vlm.load_encoder(other).state_dict()
        for name, value in left.items():
            torch.testing.assert_close(value, right[name], msg=lambda text, name=name: f"{name}: {text}")

    def generate(
        self, folder: Path, tower: Path, base: Path | None = None, out: str | None = None,
        plugged: bool = True, fails: bool = False, **more: Any,
    ) -> str:  # fmt: skip
        """Reload a checkpoint in a process of its own through LLaVA's loader, check its tower, generate."""
        places = (str(folder), base and str(base), str(self.pictures / "0.png"), str(tower))
        return self.fork(CHILDREN.generate, *places, out, plugged, more, fails=fails)

    def losses(self, out: str) -> list[float]:
        """What the Trainer logged."""
        state = json.loads((self.folder / out / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    def flags(self, out: str, *more: str, llm: str | None = None, tower: str | None = None) -> list[str]:
        """The flags of llava.train.train, as LLaVA's own scripts give them, and some for a small CPU run."""
        data = self.captions if "plain" in more else self.chats
        return [
            "--model_name_or_path", llm or str(self.llm), "--version", "v1",
            "--vision_tower", tower or str(self.encoder), "--data_path", str(data),
            "--image_folder", str(self.pictures), "--mm_projector_type", "mlp2x_gelu",
            "--mm_vision_select_layer", "-1", "--mm_use_im_start_end", "False",
            "--mm_use_im_patch_token", "False", "--output_dir", str(self.folder / out),
            "--per_device_train_batch_size", "2", "--max_steps", "2", "--learning_rate", "1e-2",
            "--lr_scheduler_type", "constant", "--logging_steps", "1", "--report_to", "none",
            "--model_max_length", "512", "--lazy_preprocess", "True", "--dataloader_num_workers", "0",
            "--save_strategy", "no", "--bf16", "True", *more,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The laboratory, built once."""
    pytest.importorskip("llava.train.llava_trainer", reason="LLaVA is not installed; see make test-llava")
    os.environ |= ENVIRONMENT  # for the forks; deepspeed reads its own when it is imported
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import sentencepiece  # noqa: F401

    import llm_integration.tower  # noqa: F401

    folder = tmp_path_factory.mktemp("llava")
    made = Lab(
        folder, folder / "tiny-vicuna", folder / "encoder", folder / "pictures", folder / "captions.json",
        folder / "chats.json",
    )  # fmt: skip
    MATERIALS.make_llm(made.llm)
    MATERIALS.make_encoder(made.encoder)
    MATERIALS.make_pictures(made.pictures, made.captions, made.chats)
    return made
