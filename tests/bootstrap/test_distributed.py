"""Two real processes under torchrun, and what the engines refuse."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from bootstrap.config import read_config
from bootstrap.distributed import choose_device, read_deepspeed
from bootstrap.log import read_log
from bootstrap.state import list_checkpoints
from bootstrap.train import bootstrap, main

Write = Callable[..., Path]


def _start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
        *("-m", "bootstrap.train", str(path), *overrides),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _torchrun(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    process = _start(path, *overrides)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
def test_two_processes_train_one_student_and_resume(write_run: Write, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 6, "save_every": 3, "batch_size": 2, "optimiser": {"warmup_steps": 2}}
    done = _torchrun(write_run("whole", **changes))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["step"] for line in read_log(tmp_path / "whole" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    # Both processes' gradients count: as many pictures in one process give the same norm.
    alone = {**changes, "batch_size": 4}
    bootstrap(read_config(write_run("alone", **alone)))
    together, single = (read_log(tmp_path / name / "log.jsonl")[0] for name in ("whole", "alone"))
    assert together["gradient_norm"] == pytest.approx(single["gradient_norm"], rel=1e-3)
    assert together["loss"] == pytest.approx(single["loss"], rel=1e-3)
    checkpoint, last = list_checkpoints(tmp_path / "whole" / "checkpoints")
    streams = json.loads((checkpoint / "state.json").read_text())["streams"]
    assert [stream["order"]["rank"] for stream in streams] == [0, 1]
    # Take away the end and go on from step 3: the same weights, bit for bit.
    shutil.rmtree(last)
    first = load_file(str(tmp_path / "whole" / "encoder" / "model.safetensors"))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "provenance.json"):
        (tmp_path / "whole" / "encoder" / name).unlink()
    (tmp_path / "whole" / "encoder").rmdir()
    again = _torchrun(tmp_path / "whole.yaml")
    assert again.returncode == 0, again.stderr[-2000:]
    second = load_file(str(tmp_path / "whole" / "encoder" / "model.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # One process cannot take up where two left off.
    for entry in (tmp_path / "whole" / "encoder").iterdir():
        entry.unlink()
    (tmp_path / "whole" / "encoder").rmdir()
    with pytest.raises(ValueError, match="was written by 2 processes, this run has 1"):
        bootstrap(read_config(tmp_path / "whole.yaml"))


@pytest.mark.slow
def test_two_processes_agree_where_they_end_when_they_are_asked_to(write_run: Write, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 120, "save_every": 0, "batch_size": 2, "log_every": 4}
    whole = _torchrun(write_run("whole", **settings))
    assert whole.returncode == 0, whole.stderr[-2000:]
    path, log = write_run("stopped", **settings), tmp_path / "stopped" / "log.jsonl"
    process = _start(path)
    deadline = time.time() + 120
    while not log.is_file() or not log.read_text():
        assert process.poll() is None, "the run ended before it was asked to"
        assert time.time() < deadline
        time.sleep(0.005)
    process.terminate()  # torchrun passes it on
    _, said = process.communicate(timeout=120)
    (checkpoint,) = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    step = int(checkpoint.name.removeprefix("step_"))
    assert step < 120
    assert step % 4 == 0
    assert f"bootstrap: stopped after step {step}, as it was asked to" in said
    again = _torchrun(path)
    assert again.returncode == 0, again.stderr[-2000:]
    first, second = (
        load_file(tmp_path / name / "encoder" / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_trains_what_one_process_trains(stage: int, write_run: Write, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    # Large enough for a resting block's decay, or its optimiser's count of steps, to show.
    optimiser = {"lr": 2e-3, "cortex_lr": 2e-3, "warmup_steps": 1, "weight_decay": 0.5}
    settings: dict[str, Any] = {"steps": 6, "objective": {"warmup": 0.5}, "optimiser": optimiser}
    bootstrap(read_config(write_run("plain", **settings)))
    path = write_run("deepspeed", engine="deepspeed", deepspeed=str(tmp_path / "ds.json"), **settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-m", "bootstrap.train", str(path)],
        env={**os.environ, **alone, **meeting, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain, ours = (read_log(tmp_path / name / "log.jsonl") for name in ("plain", "deepspeed"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in plain], rel=1e-4)
    weights = [load_file(str(tmp_path / n / "encoder" / "model.safetensors")) for n in ("plain", "deepspeed")]
    for name, value in weights[0].items():
        assert float(weights[1][name].norm()) == pytest.approx(float(value.norm()), rel=1e-4, abs=1e-5), name


def _deepspeed_config(write_run: Write, tmp_path: Path, values: object, **changes: Any) -> Any:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return read_config(write_run(engine="deepspeed", deepspeed=str(path), **changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "is not valid JSON"),
        ([], "must hold a JSON object, found list"),
        ({"zero_optimization": None}, "zero_optimization must be an object, found NoneType"),
        ({"bf16": True}, "bf16 must be an object, found bool"),
        ({"zero_optimization": {"stage": "3"}}, "use stage 2 or less"),
        ({"optimizer": {"type": "Adam"}}, "leave 'optimizer' out"),
        ({"zero_optimization": {"stage": 3}}, "use stage 2 or less"),
        ({"bf16": {"enabled": True}}, "precision=bf16 runs under autocast"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"zero_optimization\.reduce_bucket_size"),
        ({"fp16": {"enabled": True}}, "use bf16 or fp32"),
        ({"train_micro_batch_size_per_gpu": 7}, "contradicts the run's 4"),
    ],
)
def test_deepspeed_settings_that_do_not_fit_are_refused(
    values: object, message: str, write_run: Write, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_deepspeed(_deepspeed_config(write_run, tmp_path, values))


def test_deepspeed_settings_are_filled_in(write_run: Write, tmp_path: Path) -> None:
    values = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    settings = read_deepspeed(_deepspeed_config(write_run, tmp_path, values, batch_size=3, accumulate=2))
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.0


def test_what_is_no_device_is_named() -> None:
    with pytest.raises(ValueError, match="device=gpu is no device; use device=cpu, cuda"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="device=meta computes nothing here; use device=cpu, cuda or auto"):
        choose_device("meta")


def test_each_process_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("cuda", "auto"):
        assert choose_device(name) == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")] * 2
    with pytest.raises(ValueError, match="device=cuda:0 would put every process on one GPU; use device=cuda"):
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"device=cuda:2, but PyTorch sees 2 GPU\(s\) here"):
        choose_device("cuda")


def test_a_missing_deepspeed_file_is_named(write_run: Write, tmp_path: Path) -> None:
    config = read_config(write_run(engine="deepspeed", deepspeed=str(tmp_path / "none.json")))
    with pytest.raises(ValueError, match=r"there is no DeepSpeed configuration .*none\.json"):
        read_deepspeed(config)


def test_a_process_that_is_left_behind_says_so(write_run: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"
    failed = Mock(side_effect=RuntimeError(said))
    monkeypatch.setattr("bootstrap.train.bootstrap", failed)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="Connection closed"):
        main([str(write_run())])  # alone there is nobody who could say more
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="process 1 stops because another one has ended"):
        main([str(write_run())])
    failed.side_effect = RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match="of another kind"):
        main([str(write_run())])
