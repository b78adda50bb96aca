"""A laboratory for an installed LLaVA: a tiny language model, a tiny encoder, pictures, and real commands.

Importing LLaVA and what it needs takes most of the time of a tiny run. So most runs happen in forks of one
process that has imported everything; those through launchers and for a fresh Python are real command lines.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (250, 250, 250)}


@dataclass
class Lab:
    """Where everything lies."""

    folder: Path
    llm: Path
    encoder: Path
    pictures: Path
    chats: Path

    def run(self, *command: str, fails: bool = False, **environment: str) -> str:
        """Run a Python command of this environment; its output, or a failed test with the end of it."""
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "CUDA_VISIBLE_DEVICES": "", **environment,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=env, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output = done.stdout
        assert (done.returncode != 0) == fails, f"exit code {done.returncode}:\n{output[-6000:]}"
        return output

    def fork(self, function: Callable[..., Any], *arguments: Any, fails: bool = False) -> str:
        """Call a function in a process of its own, with everything imported; what it prints."""
        log = self.folder / "fork.log"

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
        process.join()
        output = log.read_text()
        assert (process.exitcode != 0) == fails, f"exit code {process.exitcode}:\n{output[-6000:]}"
        return output

    def train(self, out: str, *more: str, plugged: bool = True, fails: bool = False, **options: Any) -> str:
        """Run llava.train.train in a fork."""
        return self.fork(_train, self.flags(out, *more, **options), plugged, fails=fails)

    def losses(self, out: str) -> list[float]:
        """What the Trainer logged."""
        state = json.loads((self.folder / out / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    def flags(self, out: str, *more: str, llm: str | None = None) -> list[str]:
        """The flags of llava.train.train, as LLaVA's own scripts give them, and some for a small CPU run."""
        return [
            "--model_name_or_path", llm or str(self.llm), "--version", "v1",
            "--vision_tower", str(self.encoder), "--data_path", str(self.chats),
            "--image_folder", str(self.pictures), "--mm_projector_type", "mlp2x_gelu",
            "--mm_vision_select_layer", "-1", "--mm_use_im_start_end", "False",
            "--mm_use_im_patch_token", "False", "--output_dir", str(self.folder / out),
            "--per_device_train_batch_size", "2", "--max_steps", "2", "--learning_rate", "1e-2",
            "--lr_scheduler_type", "constant", "--logging_steps", "1", "--report_to", "none",
            "--model_max_length", "512", "--lazy_preprocess", "True", "--dataloader_num_workers", "0",
            "--save_strategy", "no", "--bf16", "True", "--use_cpu", "True", *more,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The laboratory, built once."""
    pytest.importorskip("llava.train.llava_trainer", reason="LLaVA is not installed; see make test-llava")
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import sentencepiece  # noqa: F401

    import llm_integration.tower  # noqa: F401

    folder = tmp_path_factory.mktemp("llava")
    made = Lab(folder, folder / "tiny-vicuna", folder / "encoder", folder / "pictures", folder / "chats.json")
    _make_llm(made.llm)
    make_encoder(made.encoder)
    made.pictures.mkdir()
    records = []
    for number in range(8):
        name, colour = list(COLOURS.items())[number % 4]
        Image.new("RGB", (80 + 10 * number, 72), colour).save(made.pictures / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": f"It is {name}."},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    made.chats.write_text(json.dumps(records), encoding="utf-8")
    return made


def _train(flags: list[str], plugged: bool) -> None:
    import contextlib

    from llm_integration.llava import plugged_in

    sys.argv = ["train.py", *flags]
    with plugged_in() if plugged else contextlib.nullcontext():
        runpy.run_module("llava.train.train", run_name="__main__", alter_sys=True)


def make_encoder(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A random encoder of 49 tokens, 64 wide."""
    import torch

    import sparse_vlm

    torch.manual_seed(seed)
    config = sparse_vlm.SparseFormerConfig(
        stem_channels=16, num_latents=49, cls_token=False, focusing_width=32, focusing_heads=2,
        focusing_mlp_width=64, focusing_repeats=2, num_points=4, mixing_points=8, generator_width=16,
        handover_generator_width=16, width=64, depth=2, heads=2, mlp_width=128, pooling="mean",
        output_width=0, head_bias=False,
    )  # fmt: skip
    transform = sparse_vlm.TransformConfig(image_size=64)
    sparse_vlm.build_encoder(config.replace(**changes), transform).save(folder, {"teacher": "none"})


def _make_llm(folder: Path) -> None:
    """A random two-layer Llama with a real SentencePiece tokenizer, as Vicuna's files are."""
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    folder.mkdir()
    corpus = folder.parent / "corpus.txt"
    sentences = [
        "A chat between a curious user and an artificial intelligence assistant.",
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: What colour is it? ASSISTANT: It is red. It is green. It is blue. It is white.",
    ]
    corpus.write_text("\n".join(sentences * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, hard_vocab_limit=False,
        normalization_rule_name="identity", character_coverage=1.0,
    )  # fmt: skip
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
