"""The bootstrap command end to end on a tiny teacher: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bootstrap import train as train_module
from bootstrap.config import read_config
from bootstrap.data import open_source
from bootstrap.distributed import TorchEngine
from bootstrap.evaluate import HeldOut
from bootstrap.log import read_log
from bootstrap.loop import _check_weights
from bootstrap.muon import has_muon
from bootstrap.report import draw_curves
from bootstrap.state import list_checkpoints
from bootstrap.targets import _send
from bootstrap.teacher import load_teacher
from bootstrap.train import bootstrap, main
from sparse_vlm import load_encoder
from sparse_vlm.checkpoint import load_provenance
from sparse_vlm.fingerprint import hash_tower
from sparse_vlm.preemption import StoppedError
from tests.bootstrap.conftest import TINY_STUDENT

Write = Callable[..., Path]
STUDENT: dict[str, Any] = {"architecture": TINY_STUDENT}


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "encoder" / "model.safetensors"))


def _assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_run_leaves_an_encoder_that_came_closer(
    write_run: Write, heldout_folder: Path, tmp_path: Path
) -> None:
    heldout = {"source": str(heldout_folder), "every": 10, "tokens": [3, 10]}
    path = write_run(
        steps=40, save_every=20, heldout=heldout, optimiser={"lr": 5e-3, "warmup_steps": 2, "ema": 0.5}
    )
    directory = bootstrap(read_config(path))
    encoder = load_encoder(directory)
    assert encoder.num_tokens == 5
    lines = read_log(tmp_path / "run" / "log.jsonl")
    losses = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in losses] == list(range(1, 41))
    assert set(losses[0]) >= {"handover", "loss"}
    assert "tokens" not in losses[0]  # the warm-up
    assert set(losses[-1]) >= {"handover", "tokens", "pooled", "loss", "gradient_norm", "lr"}
    assert losses[-1]["tokens"] < 0.8 * losses[9]["tokens"]
    scores = [line for line in lines if line["kind"] == "heldout"]
    assert [line["step"] for line in scores] == [10, 20, 30, 40]
    for count in (3, 10):
        by_tokens = [line for line in lines if line["kind"] == f"heldout_{count}_tokens"]
        assert [line["step"] for line in by_tokens] == [10, 20, 30, 40]
    legend = draw_curves(lines).axes[2].get_legend_handles_labels()[1]
    assert legend == ["3 tokens", "10 tokens"]
    assert len(list((tmp_path / "run" / "figures").glob("rois_*.png"))) == 4
    assert (tmp_path / "run" / "inheritance.txt").read_text().count("\n") > 20
    provenance = load_provenance(directory)
    assert provenance["steps"] == 40
    assert provenance["pictures_seen"] == 160
    last = {line["kind"]: line["cosine"] for line in lines if "cosine" in line}
    assert {count: scores["cosine"] for count, scores in provenance["figures"]["by_tokens"].items()} == {
        "3": last["heldout_3_tokens"],
        "10": last["heldout_10_tokens"],
    }
    assert provenance["blocks"] == {"drop": 1, "tune": 1, "freeze": 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_stay_the_teachers(
    write_run: Write, tmp_path: Path, tiny_teacher: Path, precision: str
) -> None:
    path = write_run(teacher={"name": str(tiny_teacher), "precision": precision}, precision=precision)
    directory = bootstrap(read_config(path))
    named = load_provenance(directory)["teacher"]["tower_sha256"]
    assert named == hash_tower(load_teacher(str(tiny_teacher)).vision_state_dict())
    ours, theirs = _weights(tmp_path / "run"), load_file(str(tiny_teacher / "open_clip_model.safetensors"))
    block = "visual.transformer.resblocks"
    torch.testing.assert_close(ours["cortex.blocks.1.mlp.fc1.weight"], theirs[f"{block}.2.mlp.c_fc.weight"])
    assert not torch.equal(ours["cortex.blocks.0.mlp.fc1.weight"], theirs[f"{block}.1.mlp.c_fc.weight"])


def test_killed_at_any_moment_it_goes_on_bit_equal(write_run: Write, tmp_path: Path) -> None:
    settings = {
        "steps": 30,
        "save_every": 3,
        # With Muon, the state of both optimisers has to come back.
        "optimiser": {"ema": 0.9, "warmup_steps": 5, "muon_lr": 1e-3 if has_muon() else 0.0},
        "student": {**STUDENT, "token_counts": [5, 5, 3]},
        "data": None,
    }
    settings.pop("data")
    bootstrap(read_config(write_run("whole", **settings)))
    path = write_run("killed", **settings)
    command = [sys.executable, "-m", "bootstrap.train", str(path)]
    # Sums are bit-equal where as many threads share them.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list_checkpoints(tmp_path / "killed" / "checkpoints"):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "encoder").exists()
    bootstrap(read_config(path))
    _assert_equal(_weights(tmp_path / "whole"), _weights(tmp_path / "killed"))
    steps = [line["step"] for line in read_log(tmp_path / "killed" / "log.jsonl")]
    assert steps == list(range(1, 31))


@pytest.mark.parametrize("everybody", [False, True])
def test_asked_to_end_it_writes_a_checkpoint_and_goes_on_bit_equal(
    write_run: Write, picture_folder: Path, heldout_folder: Path, tmp_path: Path, everybody: bool
) -> None:
    settings = {
        "steps": 40,
        "save_every": 0,
        "heldout": {"source": str(heldout_folder), "every": 10, "limit": 4},
        "data": {"source": str(picture_folder), "workers": 1},
        "optimiser": {"ema": 0.9, "warmup_steps": 5},
    }
    bootstrap(read_config(write_run("whole", **settings)))
    path = write_run("stopped", **settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "bootstrap.train", str(path)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, start_new_session=True,
    )  # fmt: skip
    log, deadline = tmp_path / "stopped" / "log.jsonl", time.time() + 120
    while not log.is_file() or log.read_text().count("\n") < 3:
        assert process.poll() is None, "the run ended before it was asked to"
        assert time.time() < deadline
        time.sleep(0.005)
    if everybody:  # its loader's worker, too
        os.killpg(process.pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    (checkpoint,) = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    step = int(checkpoint.name.removeprefix("step_"))
    assert step < 40
    assert said.splitlines()[-1] == (
        f"bootstrap: stopped after step {step}, as it was asked to; the same command goes on from there"
    )
    bootstrap(read_config(path))
    _assert_equal(_weights(tmp_path / "whole"), _weights(tmp_path / "stopped"))
    steps = [line["step"] for line in read_log(log) if line["kind"] == "train"]
    assert steps == list(range(1, 41))
    assert [line["step"] for line in read_log(log) if line["kind"] == "heldout"] == [10, 20, 30, 40]


def test_asked_to_end_all_processes_wait_for_the_checkpoint(
    write_run: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    save, gather = train_module.save_state, TorchEngine.gather

    def saved(*arguments: Any) -> Path | None:
        os.kill(os.getpid(), signal.SIGTERM)  # the second one, from a launcher
        path = save(*arguments)
        events.append("saved")
        return path

    def gathered(self: TorchEngine, value: Any) -> list[Any]:
        if not events and isinstance(value, tuple):  # of a step
            os.kill(os.getpid(), signal.SIGTERM)
        events.append("gathered")
        return gather(self, value)

    monkeypatch.setattr(train_module, "save_state", saved)
    monkeypatch.setattr(TorchEngine, "gather", gathered)
    with pytest.raises(StoppedError):
        bootstrap(read_config(write_run(save_every=1, steps=40)))
    assert events[-2:] == ["saved", "gathered"]


def test_a_checkpoints_encoder_is_what_is_evaluated(write_run: Write, tmp_path: Path) -> None:
    path = write_run(optimiser={"lr": 5e-3, "warmup_steps": 1, "ema": 0.9})
    directory = bootstrap(read_config(path))
    wanted = _weights(tmp_path / "run")
    before, last = list_checkpoints(tmp_path / "run" / "checkpoints")
    _assert_equal(wanted, _weights(last))
    shutil.rmtree(directory)
    shutil.rmtree(last)
    bootstrap(read_config(path))  # its training goes on from other weights than those
    _assert_equal(wanted, _weights(tmp_path / "run"))
    shutil.rmtree(directory)
    shutil.rmtree(last)
    (before / "trained.safetensors").unlink()
    with pytest.raises(ValueError, match=r"trained\.safetensors is missing: delete .* with the same command"):
        bootstrap(read_config(path))


@pytest.mark.gpu
def test_stored_rows_reach_a_gpu_unchanged(tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "rows.f16", dtype=np.float16, mode="w+", shape=(64, 5, 3))
    array[:] = np.arange(array.size).reshape(array.shape) % 2048
    # Several on their way at once, while the device is busy: none may overwrite another.
    busy = torch.randn(4096, 4096, device="cuda")
    draws = [np.random.default_rng(number).integers(64, size=16) for number in range(8)]
    sent = []
    for rows in draws:
        busy = (busy @ busy).tanh()
        sent.append(_send(array, rows, busy.device))
    for rows, values in zip(draws, sent, strict=True):
        assert np.array_equal(values.cpu().numpy(), array[rows])


def test_stored_targets_are_the_live_ones(
    write_run: Write, tmp_path: Path, picture_folder: Path, tiny_teacher: Path
) -> None:
    data = {"source": str(picture_folder), "workers": 0, "views": 2}
    bootstrap(read_config(write_run("live", data=data, steps=8)))
    stored = {"store": str(tmp_path / "store")}
    bootstrap(read_config(write_run("first", data=data, steps=8, targets=stored)))
    bootstrap(read_config(write_run("second", data=data, steps=8, targets=stored)))
    live, first, second = (_weights(tmp_path / name) for name in ("live", "first", "second"))
    _assert_equal(first, second)
    worst = max(float((live[name] - first[name]).abs().max()) for name in live)
    assert 0 < worst < 2e-2  # fp16 on disk
    with pytest.raises(ValueError, match="were made for scale"):
        bootstrap(read_config(write_run("third", data={**data, "scale": [0.9, 1.0]}, targets=stored)))
    coarse = {"name": str(tiny_teacher), "precision": "bf16"}
    with pytest.raises(ValueError, match="were made for precision='fp32', this run has 'bf16'"):
        bootstrap(read_config(write_run("coarse", data=data, targets=stored, teacher=coarse)))
    made_for = (tmp_path / "store" / "store.json").read_text()
    for key, words in (("source", "other pictures"), ("teacher_sha256", "a teacher with other weights")):
        (tmp_path / "store" / "store.json").write_text(json.dumps({**json.loads(made_for), key: "other"}))
        with pytest.raises(ValueError, match=f"were made for {words}"):
            bootstrap(read_config(write_run(f"other_{key}", data=data, targets=stored)))
    (tmp_path / "store" / "store.json").write_text(made_for)
    for name in ("pooled", "mid"):
        whole = (tmp_path / "store" / f"{name}.f16").read_bytes()
        (tmp_path / "store" / f"{name}.f16").write_bytes(b"\x11" * len(whole))
        with pytest.raises(ValueError, match=rf"not what the teacher says now \({name}: relative"):
            bootstrap(read_config(write_run(f"spoiled_{name}", data=data, steps=8, targets=stored)))
        (tmp_path / "store" / f"{name}.f16").write_bytes(whole)


def test_an_encoder_that_prepares_pictures_otherwise_is_no_start(write_run: Write, tmp_path: Path) -> None:
    first = bootstrap(read_config(write_run("first", steps=2)))
    again = write_run("again", steps=2, student={"start_from": str(first)})
    assert load_provenance(bootstrap(read_config(again)))["steps"] == 2
    path = first / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_std": [0.9, 0.9, 0.9]}))
    other = write_run("other", steps=2, student={"start_from": str(first)})
    with pytest.raises(ValueError, match="the encoder prepares pictures another way"):
        bootstrap(read_config(other))


def test_an_encoder_of_another_teacher_is_no_start(
    write_run: Write, tiny_teacher: Path, tmp_path: Path
) -> None:
    first = bootstrap(read_config(write_run("first", steps=1)))
    path = write_run("again", steps=1, student={"start_from": str(first), "drop": 0})
    with pytest.raises(
        ValueError, match=rf"student\.start_from={first} does not fit the teacher .*: depth is 2, not 3"
    ):
        bootstrap(read_config(path))
    with pytest.raises(
        ValueError, match=rf"{first} is an encoder directory, and no ViT .*student\.start_from"
    ):
        bootstrap(read_config(write_run("other", steps=1, teacher={"name": str(first)})))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.architecture.focusing_width=abc", "focusing_width must be a whole number, got 'abc'"),
        ("student.architecture.output_width=0", r"architecture does not fit .* has width 32, not 16"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(write_run: Write, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(read_config(write_run(), (override,)))


def test_what_starts_from_bf16_weights_learns_in_fp32(write_run: Write) -> None:
    first = bootstrap(read_config(write_run("first", steps=1)))
    weights = load_file(str(first / "model.safetensors"))
    save_file({name: value.bfloat16() for name, value in weights.items()}, str(first / "model.safetensors"))
    assert load_encoder(first).dtype == torch.bfloat16
    again = bootstrap(read_config(write_run("again", steps=1, student={"start_from": str(first)})))
    assert load_encoder(again).dtype == torch.float32


def test_a_run_goes_on_although_what_it_started_from_is_gone(write_run: Write, tmp_path: Path) -> None:
    first = bootstrap(read_config(write_run("first", steps=1)))
    path = write_run("again", student={"start_from": str(first)})
    directory = bootstrap(read_config(path))
    wanted = _weights(tmp_path / "again")
    shutil.rmtree(first)
    for last in (directory, list_checkpoints(tmp_path / "again" / "checkpoints")[-1]):
        shutil.rmtree(last)
    bootstrap(read_config(path))
    _assert_equal(wanted, _weights(tmp_path / "again"))
    shutil.rmtree(directory)
    (list_checkpoints(tmp_path / "again" / "checkpoints")[-1] / "encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"encoder is damaged \(.*config\.json.*\): delete .*step_00000006"):
        bootstrap(read_config(path))


def test_a_run_is_not_taken_up_beside_another_teacher(
    write_run: Write, tiny_teacher: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    path = write_run(teacher={"name": str(copied)})
    shutil.rmtree(bootstrap(read_config(path)))
    file = str(copied / "open_clip_model.safetensors")
    save_file({name: value * 1.01 for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"step_00000006 was written beside a teacher with other weights"):
        bootstrap(read_config(path))


def test_nothing_is_lost_if_the_end_goes_wrong(
    write_run: Write, heldout_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_every": 0, "heldout": {"source": str(heldout_folder)}}
    whole = bootstrap(read_config(write_run("whole", **settings)))
    path = write_run("broken", **settings)
    with monkeypatch.context() as patch:
        patch.setattr("bootstrap.train.draw_focus", Mock(side_effect=OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            bootstrap(read_config(path))
    assert [entry.name for entry in list_checkpoints(tmp_path / "broken" / "checkpoints")] == [
        "step_00000006"
    ]
    assert bootstrap(read_config(path)).is_dir()
    _assert_equal(_weights(tmp_path / "whole"), _weights(tmp_path / "broken"))
    assert load_provenance(whole)["figures"] == load_provenance(tmp_path / "broken" / "encoder")["figures"]


def test_a_spoiled_model_is_named_before_it_is_evaluated(write_run: Write, heldout_folder: Path) -> None:
    optimiser = {"lr": 1e30, "cortex_lr": 1e30, "warmup_steps": 0}
    heldout = {"source": str(heldout_folder), "every": 1}
    path = write_run(steps=30, save_every=0, log_every=30, optimiser=optimiser, heldout=heldout)
    with pytest.raises(FloatingPointError, match=r"lower optimiser.lr"):
        bootstrap(read_config(path))


def test_a_finished_run_is_left_alone(write_run: Write, tmp_path: Path) -> None:
    path = write_run()
    bootstrap(read_config(path))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()}
    bootstrap(read_config(path, ("log_every=7",)))
    assert before == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*") if file.is_file()
    }


def test_accumulation_equals_a_larger_batch(write_run: Write, tmp_path: Path) -> None:
    settings = {"steps": 3, "objective": {"warmup": 0.0}, "optimiser": {"warmup_steps": 1}}
    bootstrap(read_config(write_run("large", batch_size=4, **settings)))
    bootstrap(read_config(write_run("small", batch_size=2, accumulate=2, **settings)))
    large, small = (read_log(tmp_path / name / "log.jsonl") for name in ("large", "small"))
    for left, right in zip(large, small, strict=True):
        for figure in ("loss", "gradient_norm"):
            assert left[figure] == pytest.approx(right[figure], rel=1e-3), (left["step"], figure)
    # A sum in another order moves a few weights by a step or so; on the whole they went the same way.
    start = load_encoder(
        bootstrap(read_config(write_run("start", steps=1, optimiser={"lr": 0, "cortex_lr": 0})))
    )
    moved = apart = 0.0
    for name, value in start.state_dict().items():
        one, other = (_weights(tmp_path / run)[name] for run in ("large", "small"))
        moved += float((one - value).square().sum())
        apart += float((one - other).square().sum())
    assert moved > 1e-2
    assert apart < 1e-3 * moved


def test_the_rates_of_the_joint_phase_may_be_lower(write_run: Write, tmp_path: Path) -> None:
    settings = {"steps": 4, "log_every": 1, "objective": {"warmup": 0.5}}
    for name, share in (("alike", {}), ("lower", {"joint_lr": 0.25})):
        bootstrap(read_config(write_run(name, optimiser={"warmup_steps": 1, **share}, **settings)))
    alike, lower = (read_log(tmp_path / name / "log.jsonl") for name in ("alike", "lower"))
    rates = [(left["lr"], right["lr"]) for left, right in zip(alike, lower, strict=True) if "lr" in left]
    assert [right / left for left, right in rates] == pytest.approx([1.0, 1.0, 0.25, 0.25])
    # Up to the first step at another rate both runs are one.
    losses = [left["loss"] == right["loss"] for left, right in zip(alike, lower, strict=True)]
    assert losses == [True, True, True, False]
    with pytest.raises(ValueError, match="joint_lr must be a number of 0 or more"):
        read_config(write_run("wrong", optimiser={"joint_lr": -1}))


def test_bf16_and_checkpointing_run(write_run: Write) -> None:
    student = {**STUDENT, "activation_checkpointing": True}
    directory = bootstrap(read_config(write_run(precision="bf16", student=student)))
    assert load_encoder(directory).dtype == torch.float32


@pytest.mark.parametrize("log_every", [1, 30])
def test_nan_loss_stops_before_anything_is_spoiled(write_run: Write, tmp_path: Path, log_every: int) -> None:
    optimiser = {"lr": 1e30, "cortex_lr": 1e30, "warmup_steps": 0}
    path = write_run(steps=30, save_every=1, log_every=log_every, optimiser=optimiser)
    with pytest.raises(FloatingPointError, match=r"the (loss|gradient norm) is .* at step"):
        bootstrap(read_config(path))
    assert not (tmp_path / "run" / "encoder").exists()
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        state = load_file(str(checkpoint / "encoder" / "model.safetensors"))
        assert all(value.isfinite().all() for value in state.values()), checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"name": "timm:no_such_model"}}, "no_such_model"),
        ({"teacher": {"name": ""}}, "teacher: name is empty"),
        ({"data": {"source": "/nowhere/at/all"}}, "does not exist"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"stepz": 3}, "stepz"),
        ({"out": ""}, "out is empty: name a run directory"),
        ({"seed": 1 << 70}, r"seed must be 0 or more and less than 2\*\*63"),
        ({"data": {"source": "x", "ratio": [1.0, float("inf")]}}, "ratio must be two positive, finite"),
        ({"targets": {"store": "x"}}, "set data.views to 1 or more"),
        ({"engine": "deepspeed"}, "set both or neither"),
        ({"engine": "ddp"}, "needs a launcher"),
        ({"device": "cuda:7"} if not torch.cuda.is_available() else {"steps": -1}, "must be|sees no GPU"),
        ({"student": {"architecture": {"widht": 3}}}, "student.architecture, .* did you mean 'width'"),
        ({"student": {"architecture": {"width": 48}}}, "width is 48, not 32"),
        ({"student": {"drop": 3}}, "no block to inherit"),
        ({"student": {"start_from": "x", "architecture": {"depth": 2}}}, "leave architecture out"),
        ({"heldout": {"truth": "index_prefix"}}, "name their source"),
        ({"figure": "photo.jpg"}, "name heldout.source"),
        (
            {"student": {**STUDENT, "token_counts": [5, 1]}},
            "student.token_counts: num_tokens must be at least 2",
        ),
        ({"heldout": {"source": "PICTURES", "tokens": [1]}}, "heldout.tokens: num_tokens must be at least 2"),
        ({"heldout": {"source": "PICTURES"}, "figure": "/nowhere.jpg"}, "figure=/nowhere.jpg is no picture"),
        ({"heldout": {"source": "PICTURES"}, "figure": __file__}, "is no picture that can be read"),
        ({"objective": {"relations": 1.0}, "batch_size": 1}, "compares the pictures of a batch"),
        ({"objective": {"pooled": float("nan")}}, "pooled must be a number of 0 or more, got nan"),
        ({"optimiser": {"final_lr": -1}}, "final_lr is a share of the peak"),
        ({"optimiser": {"lr": float("nan")}}, "lr must be a number of 0 or more, got nan"),
        ({"optimiser": {"clip_norm": float("nan")}}, "clip_norm must be above 0, got nan"),
    ],
)
def test_bad_settings_end_with_one_sentence(
    changes: dict[str, Any],
    message: str,
    write_run: Write,
    heldout_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if changes.get("heldout", {}).get("source") == "PICTURES":
        changes = {**changes, "heldout": {**changes["heldout"], "source": str(heldout_folder)}}
    with pytest.raises(SystemExit, match=message) as stopped:
        main([str(write_run(**changes))])
    assert str(stopped.value).startswith("bootstrap: ")
    assert not (tmp_path / "run" / "log.jsonl").exists()  # before the first step
    assert "Traceback" not in capsys.readouterr().err


def test_an_empty_folder_is_named(write_run: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty"):
        main([str(write_run(data={"source": str(tmp_path / "empty")}))])


def test_a_run_that_is_stopped_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bootstrap.train.bootstrap", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["configs/bootstrap/quickstart.yaml", "out=runs/mine"])
    assert ended.value.code == 130
    assert "the same command goes on from the newest checkpoint in runs/mine" in capsys.readouterr().err


def test_other_settings_in_the_same_place_are_refused(write_run: Write) -> None:
    bootstrap(read_config(write_run()))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(batch_size\)"):
        bootstrap(read_config(write_run(batch_size=2)))
    path = write_run(optimiser={"lr": 0.5, "ema": 0.5})
    with pytest.raises(ValueError, match=r"other settings \(data\.seed, optimiser\.ema, optimiser\.lr\): "):
        bootstrap(read_config(path, ("data.seed=1", "data.workers=1", "heldout.limit=3")))


def test_a_run_from_before_a_setting_was_there_goes_on(write_run: Write) -> None:
    path = write_run()
    encoder = bootstrap(read_config(path))
    settings = encoder.parent / "config.yaml"
    older = yaml.safe_load(settings.read_text())
    del older["figure"], older["engine"], older["optimiser"]["muon_lr"], older["data"]["stream_block"]
    settings.write_text(yaml.safe_dump(older))
    assert bootstrap(read_config(path)) == encoder
    settings.write_text(yaml.safe_dump({**older, "dropped_since": 3}))
    with pytest.raises(ValueError, match=r"other settings \(.*dropped_since"):
        bootstrap(read_config(path))


def test_a_file_is_no_run_directory(write_run: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"out=.*file is a file: name a directory"):
        bootstrap(read_config(write_run(), (f"out={tmp_path / 'file'}",)))


def test_an_engine_that_tells_no_norm_has_its_weights_looked_at() -> None:
    encoder = torch.nn.Linear(2, 2)
    student: Any = SimpleNamespace(encoder=encoder)
    silent: Any = SimpleNamespace(keeps_optimiser=False)
    _check_weights(student, 3, silent)
    with torch.no_grad():
        encoder.weight[0, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="weights are no longer numbers at step 3"):
        _check_weights(student, 3, silent)
    _check_weights(student, 3, SimpleNamespace(keeps_optimiser=True))  # type: ignore[arg-type]
    encoder.weight.requires_grad_(False)
    _check_weights(student, 3, silent)
    encoder.requires_grad_(False)  # nothing is trained
    _check_weights(student, 3, silent)


def test_a_run_that_was_moved_is_still_the_same(write_run: Write, tmp_path: Path) -> None:
    encoder = bootstrap(read_config(write_run()))
    moved = encoder.parent.rename(tmp_path / "moved")
    assert bootstrap(read_config(write_run(), (f"out={moved}",))) == moved / "encoder"


def test_a_start_that_failed_leaves_the_place_free(write_run: Write, heldout_folder: Path) -> None:
    heldout = {"source": str(heldout_folder), "truth": "/nowhere.json"}
    with pytest.raises(ValueError, match=r"heldout\.truth"):
        bootstrap(read_config(write_run(heldout=heldout)))
    assert bootstrap(read_config(write_run(steps=1, batch_size=3))).is_dir()


def test_the_number_of_workers_is_not_in_the_weights(write_run: Write, picture_folder: Path) -> None:
    weights = []
    for workers in (0, 2):
        data = {"source": str(picture_folder), "workers": workers}
        encoder = bootstrap(read_config(write_run(f"run{workers}", steps=1, data=data)))
        weights.append((encoder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_run_lists_its_pictures_once(write_run: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Mock(side_effect=open_source)
    monkeypatch.setattr("bootstrap.data.stream.open_source", opened)
    bootstrap(read_config(write_run(steps=1)))
    assert opened.call_count == 1


def test_as_many_workers_read_held_out_pictures(
    write_run: Write, picture_folder: Path, heldout_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = Mock(side_effect=HeldOut)
    monkeypatch.setattr("bootstrap.train.HeldOut", looked)
    data = {"source": str(picture_folder), "workers": 1}
    bootstrap(read_config(write_run(steps=1, data=data, heldout={"source": str(heldout_folder)})))
    assert looked.call_args.args[3] == 1


def test_a_foreign_folder_is_not_touched(write_run: Write, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        bootstrap(read_config(write_run()))
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_key_that_is_there_twice_is_refused(write_run: Write) -> None:
    path = write_run()
    path.write_text(path.read_text() + "data:\n  views: 2\n")
    with pytest.raises(SystemExit, match=r"is not valid YAML: the key 'data' is there twice"):
        main([str(path)])


def test_a_resumed_run_leaves_the_inheritance_as_it_was(write_run: Write, tmp_path: Path) -> None:
    path = write_run()
    shutil.rmtree(bootstrap(read_config(path)))
    before = (tmp_path / "run" / "inheritance.txt").read_text()
    assert "replaced by its measured state" in before
    bootstrap(read_config(path))
    assert (tmp_path / "run" / "inheritance.txt").read_text() == before


def test_overrides_reach_the_resolved_config(
    write_run: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(write_run()), "steps=2", "optimiser.lr=0.002"])
    assert "optimiser.warmup_steps=100 is more than steps=2" in capsys.readouterr().err
    resolved = (tmp_path / "run" / "config.yaml").read_text()
    assert "steps: 2" in resolved
    assert "lr: 0.002" in resolved
    assert json.loads((tmp_path / "run" / "figures.json").read_text()) == {}


def test_weights_are_looked_at_before_a_checkpoint(write_run: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("bootstrap.loop._check_weights", lambda student, done, engine: seen.append(done))
    config = read_config(write_run(save_every=2, log_every=1000))
    bootstrap(config)
    assert seen == [*range(2, config.steps, 2), config.steps]
