"""A laboratory for an installed LLaVA: a tiny language model, a tiny encoder, pictures, and real commands.

Importing LLaVA and what it needs takes most of the time of a tiny run. So most runs happen in forks of one
process that has imported everything; one of each launcher and of each task for a fresh Python is a real
command line.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
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
# What has to come first under DeepSpeed on a CPU: LLaVA synchronises CUDA before it saves, where there is
# nothing to synchronise, and DeepSpeed would compile collectives over shared memory for minutes. The last
# lines are for check_zero.
ON_CPU = """
import deepspeed, torch
torch.cuda.synchronize = lambda *args: None
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
initialize = deepspeed.initialize
def initialize_and_tell(**arguments):
    made = initialize(**arguments)
    print("DeepSpeed runs with ZeRO stage", made[0].zero_optimization_stage(), flush=True)
    return made
deepspeed.initialize = initialize_and_tell
"""
# From every part of the encoder that the visual tokens depend on.
TUNED_WEIGHTS = (
    "stem.conv.weight", "focusing.initial_rois", "focusing.stage.mixing.generator_out.weight",
    "focusing.stage.adjust.weight", "cortex.blocks.0.attn.qkv.weight", "cortex.blocks.1.mlp.fc2.weight",
    "head.norm.weight",
)  # fmt: skip
PREFIX = "model.vision_tower.encoder."  # of the tower's weights in LLaVA's own files
ASK = "<image>\nWhat colour is it?"
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (250, 250, 250)}


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
    on_cpu = ON_CPU

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
        for process, _ in started:
            process.join()
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
            return self.fork(_train, [*flags, *CPU], plugged, fails=fails)
        port = self.find_port()
        started = []
        for rank in range(ranks):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            given = [f"--local_rank={rank}", "-m", "llava.train.train", *self.zero(zero), *flags]
            started.append(self.start(_train_under_deepspeed, given, environment))
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
        self, folder: Path, tower: Path, base: Path | None = None, out: str | None = None, **more: Any
    ) -> None:
        """Reload a checkpoint in a process of its own through LLaVA's loader, check its tower, generate."""
        picture = str(self.pictures / "0.png")
        self.fork(generate, str(folder), base and str(base), picture, str(tower), out, more)

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
    made.captions.write_text(json.dumps(records), encoding="utf-8")
    for number in range(8, 12):  # without a picture, as some of LLaVA's own mix are
        turns = [{"from": "human", "value": "What colour is it?"}, {"from": "gpt", "value": "It is red."}]
        records.append({"id": str(number), "conversations": turns})
    made.chats.write_text(json.dumps(records), encoding="utf-8")
    return made


def _train(flags: list[str], plugged: bool) -> None:
    from llm_integration.llava.__main__ import main

    if plugged:
        main(["-m", "llava.train.train", *flags])
        return
    sys.argv = ["train.py", *flags]
    runpy.run_module("llava.train.train", run_name="__main__", alter_sys=True)


def _train_under_deepspeed(given: list[str], environment: dict[str, Any]) -> None:
    from llm_integration.llava.__main__ import main

    os.environ.update({name: str(value) for name, value in environment.items()})
    exec(ON_CPU, {})
    main(given)


def load(folder: str, base: str | None, **more: Any) -> tuple[Any, Any, Any]:
    """LLaVA's own loading, on the CPU: tokenizer, model in fp32, image processor."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(folder)
    tokenizer, model, processor, _ = load_pretrained_model(folder, base, name, device="cpu", **more)
    return tokenizer, model.float(), processor


def generate(
    folder: str, base: str | None, picture: str, tower: str, out: str | None, more: dict[str, Any]
) -> None:
    """LLaVA's own loading and generation; checks the tower, merges and saves if asked to."""
    import torch
    from llava.mm_utils import process_images, tokenizer_image_token

    import sparse_vlm
    from llm_integration.llava import plugged_in

    with plugged_in():
        tokenizer, model, processor = load(folder, base, **more)
    expected = sparse_vlm.load_encoder(tower).state_dict()
    found = model.get_vision_tower().encoder.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key].float(), found[key]) for key in found)
    assert all(value.numel() and torch.isfinite(value).all() for value in model.state_dict().values())
    images = process_images([Image.open(picture)], processor, model.config)
    tokens = tokenizer_image_token(f"USER: {ASK} ASSISTANT:", tokenizer, return_tensors="pt")[None]
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
