"""What may go wrong on the way: full disks, vanished pictures, damaged checkpoints, a second process."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bootstrap.config import read_config
from bootstrap.train import bootstrap

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
    _fill_disk(monkeypatch, free=24 * row - 1)
    path = write_run(steps=6, **stored)
    with pytest.raises(ValueError, match=r"targets\.store=.*store still needs 5.07e-05 GB, and its disk has"):
        bootstrap(read_config(path))
    # A run that looks at fewer views than there are needs less, and what is stored needs nothing more.
    assert bootstrap(read_config(write_run("short", **{**stored, "steps": 5}))).is_dir()
    monkeypatch.undo()
    assert bootstrap(read_config(path)).is_dir()
    _fill_disk(monkeypatch, free=0)
    assert bootstrap(read_config(write_run("again", steps=6, **stored))).is_dir()


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
