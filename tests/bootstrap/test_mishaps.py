"""What may go wrong on the way: full disks, vanished pictures, damaged checkpoints, a second process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bootstrap import train as train_module
from bootstrap.config import read_config
from bootstrap.distributed import TorchEngine
from bootstrap.evaluate import HeldOut
from bootstrap.lock import lock_directory
from bootstrap.log import read_log
from bootstrap.state import list_checkpoints
from bootstrap.targets import StoredTargets
from bootstrap.train import _warn_of_bf16, bootstrap
from sparse_vlm import load_encoder

Write = Callable[..., Path]


def _fill_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - free, free))


def _store(picture_folder: Path, tmp_path: Path) -> dict[str, Any]:
    data = {"source": str(picture_folder), "workers": 0, "views": 2}
    return {"data": data, "targets": {"store": str(tmp_path / "store")}, "objective": {"warmup": 0.0}}


def test_a_store_that_the_disk_has_no_room_for_is_not_begun(
    write_run: Write, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = _store(picture_folder, tmp_path)
    row = 2 * (16 * 32 + 16 * 32 + 16)  # mid, tokens, pooled in fp16
    _fill_disk(monkeypatch, free=22 * row)
    path = write_run(steps=6, **stored)
    with pytest.raises(ValueError, match=r"targets\.store=.*store still needs \S+ GB, and its disk has"):
        bootstrap(read_config(path))
    # A run that looks at fewer views than there are needs less, and what is stored needs nothing more.
    assert bootstrap(read_config(write_run("short", **{**stored, "steps": 5}))).is_dir()
    monkeypatch.undo()
    assert bootstrap(read_config(path)).is_dir()
    _fill_disk(monkeypatch, free=0)
    assert bootstrap(read_config(write_run("again", steps=6, **stored))).is_dir()


def test_processes_of_one_number_on_two_machines_make_one_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = object.__new__(StoredTargets)
    store.folder = tmp_path
    link, others = os.link, []

    def link_after_another(source: Path, target: Path) -> None:
        if not others:
            others.append("the other machine's process")
            store._make("mid.f16", np.float16, (3, 4))
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_another)
    made = store._make("mid.f16", np.float16, (3, 4))
    assert made.stat().st_size == 24
    assert list(tmp_path.iterdir()) == [made]


def test_a_disk_that_fills_while_targets_are_stored_is_said(
    write_run: Write, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    stored = _store(picture_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"disk is full; make room and run the command again: '.*mid\.f16'"):
            bootstrap(read_config(write_run(**stored)))
    assert bootstrap(read_config(write_run(**stored))).is_dir()


def _checkpoints(out: Path) -> list[Path]:
    return list_checkpoints(out / "checkpoints")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("encoder/model.safetensors", "half"),
        ("encoder/model.safetensors", None),
        ("optimiser.safetensors", "half"),
        ("spreads.safetensors", "half"),
        ("random_0.safetensors", None),
        ("state.json", "half"),
    ],
)
def test_a_damaged_checkpoint_says_which_file_and_what_to_do(
    write_run: Write, tmp_path: Path, file: str, content: str | None
) -> None:
    path = write_run()
    shutil.rmtree(bootstrap(read_config(path)))
    older, newest = _checkpoints(tmp_path / "run")
    whole = (newest / file).read_bytes()
    (newest / file).unlink()
    if content:
        (newest / file).write_bytes(whole[: len(whole) // 2])
    what = "damaged" if content else "missing"
    with pytest.raises(
        ValueError, match=rf"{newest / file} is {what}.*: delete {newest} to go on from {older.name}"
    ):
        bootstrap(read_config(path))
    shutil.rmtree(newest)
    assert bootstrap(read_config(path)).is_dir()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("run/config.yaml", "out: {", r"run/config\.yaml is damaged"),
        ("store/store.json", "{", r"store/store\.json is damaged .*: delete .*store, or name another"),
        ("run/log.jsonl", '{"kind": "train", "st\n3\n', None),
    ],
)
def test_other_damaged_files_are_named(
    write_run: Write, picture_folder: Path, tmp_path: Path, file: str, content: str, message: str | None
) -> None:
    path = write_run(**_store(picture_folder, tmp_path))
    shutil.rmtree(bootstrap(read_config(path)))
    (tmp_path / file).write_text(content)
    if message is None:
        assert bootstrap(read_config(path)).is_dir()
    else:
        with pytest.raises(ValueError, match=message):
            bootstrap(read_config(path))


def test_checkpoints_of_before_are_taken_up(write_run: Write, tmp_path: Path) -> None:
    path = write_run()
    encoder = bootstrap(read_config(path))
    wanted = (encoder / "model.safetensors").read_bytes()
    shutil.rmtree(encoder)
    newest = _checkpoints(tmp_path / "run")[-1]
    shutil.rmtree(newest)
    older = _checkpoints(tmp_path / "run")[-1]
    (older / "encoder" / "model.safetensors").rename(older / "encoder.safetensors")
    shutil.rmtree(older / "encoder")
    assert (bootstrap(read_config(path)) / "model.safetensors").read_bytes() == wanted


def test_with_other_processes_a_run_begins_from_the_checkpoints_weights(
    write_run: Write, tmp_path: Path
) -> None:
    path = write_run()
    shutil.rmtree(bootstrap(read_config(path)))
    newest = _checkpoints(tmp_path / "run")[-1]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**state, "streams": state["streams"] * 2}))
    with pytest.raises(ValueError, match="was written by 2 processes, this run has 1") as refused:
        bootstrap(read_config(path))
    start, architecture = str(refused.value).split()[-2:]
    assert start == f"student.start_from={newest / 'encoder'}"
    again = bootstrap(read_config(path, (f"out={tmp_path / 'again'}", start, architecture)))
    assert load_encoder(again).num_tokens == 5
    shutil.rmtree(newest / "encoder")
    with pytest.raises(ValueError, match="start as many, or start anew in another directory"):
        bootstrap(read_config(path))


def test_what_ends_an_evaluation_costs_no_checkpoint_and_no_figures(
    write_run: Write, heldout_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_every": 2, "heldout": {"source": str(heldout_folder), "every": 2}}
    whole = bootstrap(read_config(write_run("whole", **settings)))
    path = write_run(**settings)

    def gone(*arguments: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "score", gone)
        with pytest.raises(OSError, match="gone"):
            bootstrap(read_config(path))
    assert [entry.name for entry in _checkpoints(tmp_path / "run")] == ["step_00000002"]
    again = bootstrap(read_config(path))
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    lines = [
        [{**line, "seconds": 0, "waited_for_data_s": 0} for line in read_log(run.parent / "log.jsonl")]
        for run in (whole, again)
    ]
    assert lines[0] == lines[1]


def test_one_process_at_a_time_in_a_run_directory(write_run: Write, tmp_path: Path) -> None:
    path = write_run(steps=2)
    (tmp_path / "run").mkdir()
    code = (
        "import sys, time; from pathlib import Path; from bootstrap.lock import lock_directory\n"
        "with lock_directory(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(
            ValueError, match=rf"run is in use by process {holder.pid} on .*: wait for it, stop it"
        ):
            bootstrap(read_config(path))
        assert [entry.name for entry in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert bootstrap(read_config(path)).is_dir()
    assert bootstrap(read_config(path)).is_dir()


def test_where_there_are_no_locks_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with lock_directory(tmp_path), lock_directory(tmp_path):
        pass


def test_a_run_among_its_own_pictures_is_refused(
    write_run: Write, picture_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(picture_folder, tmp_path / "pictures"))
    heldout = {"source": str(shutil.copytree(picture_folder, tmp_path / "heldout"))}
    path = write_run(data={"source": str(folder), "workers": 0}, steps=1, heldout=heldout)
    with pytest.raises(ValueError, match=r"out=.*pictures/run lies in the picture folder"):
        bootstrap(read_config(path, (f"out={folder / 'run'}",)))
    assert bootstrap(read_config(path, (f"out={folder / '.runs' / 'one'}",))).is_dir()  # not searched
    nothing_drawn = write_run("blind", data={"source": str(folder), "workers": 0}, steps=1)
    assert bootstrap(read_config(nothing_drawn, (f"out={folder / 'two'}",))).is_dir()


def test_a_raised_limit_of_bad_pictures_goes_on(write_run: Write, picture_folder: Path) -> None:
    data = {"source": str(picture_folder), "workers": 0}
    shutil.rmtree(bootstrap(read_config(write_run(data=data))))
    assert bootstrap(read_config(write_run(data={**data, "max_bad_share": 0.5}))).is_dir()


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_on_a_processor_that_is_slow_in_it_is_said(
    fast: bool, write_run: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
    config = read_config(write_run(precision="bf16"))
    _warn_of_bf16(config, torch.device("cpu"))
    said = capsys.readouterr().err
    assert fast != ("no instructions for bf16, in which it is slow: precision=fp32 is faster" in said)
    _warn_of_bf16(config, torch.device("cuda"))
    _warn_of_bf16(read_config(write_run()), torch.device("cpu"))
    assert capsys.readouterr().err == ""


def _interrupt(*given: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_that_is_stopped_before_it_has_settings_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "read_config", _interrupt)
    with pytest.raises(SystemExit) as stopped:
        train_module.main(["x.yaml"])
    assert stopped.value.code == 130


def test_home_in_the_settings_of_an_earlier_run_is_the_same_place(
    write_run: Write, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(picture_folder.parent))
    home = f"~/{picture_folder.name}"
    path = write_run(steps=1, data={"source": home, "workers": 0})
    encoder = bootstrap(read_config(path))
    settings = encoder.parent / "config.yaml"
    settings.write_text(settings.read_text().replace(str(picture_folder), home))
    assert bootstrap(read_config(path)) == encoder


def test_a_key_twice_is_refused_and_merged_ones_are_not(write_run: Write, tmp_path: Path) -> None:
    path = write_run()
    plain = path.read_text()
    path.write_text(f"{plain}\nsteps: 3\n")
    with pytest.raises(ValueError, match="the key 'steps' is there twice"):
        read_config(path)
    path.write_text(f"{plain}\n? [a, b]\n: 1\n")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_config(path)
    merged = "optimiser: &one {lr: 0.5}\nobjective:\n  <<: {warmup: 0.0, tokens: 0.5}\n  tokens: 2.0\n"
    path.write_text(f"{plain}\n{merged}")
    config = read_config(path)
    assert (config.objective.tokens, config.objective.warmup) == (2.0, 0.0)


def test_bad_pictures_of_other_processes_count(write_run: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TorchEngine.gather

    def gather(self: TorchEngine, value: Any) -> list[Any]:
        # Another process, which skips nine of ten.
        return [value, (value[0], (1000, 900), False)] if isinstance(value, tuple) else plain(self, value)

    monkeypatch.setattr(TorchEngine, "gather", gather)
    with pytest.raises(
        ValueError, match=r"900 of \d+ pictures skipped by 2 processes; that is more than data"
    ):
        bootstrap(read_config(write_run()))
