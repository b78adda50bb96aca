"""Tuning on two processes through the real `deepspeed` launcher: agreement, adapters, resume after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from llm_integration.config import load_settings
from llm_integration.export import export
from llm_integration.generate import load_chat
from llm_integration.load import load_llava
from llm_integration.result import load_model
from llm_integration.train import train

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    """Settings of six updates over sixteen conversations, a quarter of them without a picture."""
    folder = tmp_path_factory.mktemp("chat")
    records = []
    for number in range(16):
        colour = ("red", "green", "blue")[number % 3]
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.jpg")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour?"},
            {"from": "gpt", "value": f"it is {colour}"},
        ]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    for number in (3, 7, 11, 15):
        del records[number]["image"]
        records[number]["conversations"][0]["value"] = "What do you say?"  # type: ignore[index]
    (folder / "chat.json").write_text(json.dumps(records))
    others = [{**record, "id": "held out"} for record in records[:5]]
    (folder / "others.json").write_text(json.dumps(others))
    (folder / "run.yaml").write_text(
        f"model: {llava_dir}\nout: {folder / 'out'}\n"
        f"data: {{records: [{folder / 'chat.json'}], workers: 0}}\n"
        f"heldout: {{records: [{folder / 'others.json'}], every: 3}}\n"
        "optim: {learning_rate: 1.0e-3, warmup_fraction: 0.0, schedule: constant}\n"
        "batch: 2\naccumulation: 2\nmax_steps: 6\nprecision: fp32\nlog_every: 1\ncheckpoint_every: 2\n"
    )
    return folder / "run.yaml"


def _command(config: Path, stage: int, *overrides: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"),
        *("--master_port", str(port)),
        *("--module", "llm_integration.train", str(config), f"deepspeed=configs/deepspeed/zero{stage}.json"),
        *overrides,
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja lies there
    cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **cpu, "PATH": path}


def _launch(config: Path, stage: int, *overrides: str) -> None:
    done = subprocess.run(
        _command(config, stage, *overrides),
        cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _losses(out: Path, name: str = "loss") -> dict[int, float]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry[name] for entry in entries if name in entry}


@pytest.fixture(scope="module")
def plain(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, with the same global batches."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(load_settings(config, ["batch=4", f"out={out}"]))
    return out


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_agree_with_one_process(config: Path, plain: Path, tmp_path: Path, stage: int) -> None:
    out = tmp_path / "run"
    _launch(config, stage, f"out={out}", "self_contained=true")
    assert _losses(out) == pytest.approx(_losses(plain), abs=2e-4)
    heldout = _losses(out, "heldout_loss")
    assert list(heldout) == [0, 3, 6]
    assert heldout == pytest.approx(_losses(plain, "heldout_loss"), abs=2e-4)
    whole, trained = load_model(plain / "final"), load_llava(out / "final")  # strict: no weight of size 0
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], value, atol=2e-3, rtol=1e-2, msg=name)


def test_zero_3_goes_on_after_sigkill(config: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = _command(config, 3, f"out={out}")
    process = subprocess.Popen(
        words, cwd=ROOT, env=_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 1200
    checkpoint = out / "checkpoints" / "checkpoint-2" / "whole.json"
    while not checkpoint.is_file() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    assert checkpoint.is_file()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "final").exists()
    _launch(config, 3, f"out={out}")
    assert _losses(out) == pytest.approx(_losses(plain), abs=2e-4)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1, "the run began anew"


@pytest.mark.parametrize("stage", [2, 3])
def test_asked_to_end_they_write_a_checkpoint_and_go_on(
    config: Path, plain: Path, tmp_path: Path, stage: int
) -> None:
    out = tmp_path / "run"
    words = (f"out={out}", "checkpoint_every=0", "data.workers=1")
    process = subprocess.Popen(
        _command(config, stage, *words), cwd=ROOT, env=_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 1200
    log = out / "log.jsonl"
    while not (log.is_file() and 1 in _losses(out)) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: launchers, processes, loaders' workers
    process.wait()
    while not list((out / "checkpoints").glob("checkpoint-*/whole.json")):
        assert time.monotonic() < end, "there is no checkpoint"
        time.sleep(0.1)
    assert not (out / "final").exists()
    time.sleep(10)  # until all have left
    _launch(config, stage, *words)
    assert _losses(out) == pytest.approx(_losses(plain), abs=2e-4)


def test_a_restart_within_the_second_epoch_changes_nothing(config: Path, tmp_path: Path) -> None:
    words = ("accumulation=1", "max_steps=null", "epochs=2", "checkpoint_every=5", f"out={tmp_path / 'run'}")
    _launch(config, 2, *words)
    whole = _losses(tmp_path / "run")
    assert max(whole) == 8
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-8")
    _launch(config, 2, *words)
    assert _losses(tmp_path / "run") == whole


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["projector", "adapters"])
def test_checkpoints_hold_what_is_trained_and_go_on(
    config: Path, tmp_path: Path, stage: int, kind: str
) -> None:
    words = {
        "projector": ("stage=align", "data.template=plain"),
        "adapters": ("lora.rank=4", "lora.alpha=8", "lora.dropout=0.0"),
    }[kind]
    out = tmp_path / "run"
    _launch(config, stage, *words, f"out={out}")
    whole = _losses(out)
    newest = out / "checkpoints" / "checkpoint-6"
    model = next(newest.glob("global_step*/*mp_rank_00_model_states.pt"))
    stored = torch.load(model, weights_only=False)
    names = (out / "trained.txt").read_text().split()
    assert stored["module"].keys() - stored["buffer_names"] == set(names)
    assert not stored["frozen_param_fragments"]
    final = {path.name: path.read_bytes() for path in (out / "final").rglob("*.safetensors")}
    shutil.rmtree(out / "final")
    shutil.rmtree(newest)
    _launch(config, stage, *words, f"out={out}")
    assert _losses(out) == whole
    assert {path.name: path.read_bytes() for path in (out / "final").rglob("*.safetensors")} == final
    load_model(out / "final")


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters(config: Path, tmp_path: Path, llava_dir: Path, stage: int) -> None:
    lora = ("lora.rank=4", "lora.alpha=8", "lora.dropout=0.0")
    _launch(config, stage, *lora, f"out={tmp_path / 'run'}")
    train(load_settings(config, ["batch=4", *lora, f"out={tmp_path / 'plain'}"]))
    assert _losses(tmp_path / "run") == pytest.approx(_losses(tmp_path / "plain"), abs=2e-4)
    names = (tmp_path / "run" / "trained.txt").read_text().split()
    assert not any("vision_tower" in name for name in names)
    assert any("language_model" in name for name in names)
    export(tmp_path / "run" / "final", tmp_path / "llava")
    export(tmp_path / "plain" / "final", tmp_path / "other")
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    merged, other = load_llava(tmp_path / "llava"), load_llava(tmp_path / "other")
    torch.testing.assert_close(merged(**ids).logits, other(**ids).logits, atol=2e-2, rtol=1e-2)
    assert not torch.equal(merged(**ids).logits, load_llava(llava_dir)(**ids).logits)
    assert load_chat(tmp_path / "run" / "final").visual_tokens == 9


def test_a_bad_setting_is_said_in_a_sentence(config: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        _command(config, 2, f"out={tmp_path / 'run'}", "data.max_lenght=3"),
        cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "did you mean 'data.max_length'" in done.stdout + done.stderr
