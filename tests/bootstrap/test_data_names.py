"""Names in two arrays: what a list of them would say, in a fraction of its memory."""

from __future__ import annotations

import gc
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from bootstrap.data import DataConfig, open_source
from bootstrap.data.names import PackedNames
from bootstrap.data.source import PictureSource

NAMES = ["a/1.jpg", "", "a/ü.png", "bad\udcff.jpg", "last"]


@pytest.mark.parametrize("names", [NAMES, [], [""], ["one"]])
def test_they_are_read_as_a_list_is(names: list[str]) -> None:
    packed = PackedNames(names)
    assert len(packed) == len(names)
    assert list(packed) == names
    assert [packed[-place - 1] for place in range(len(names))] == names[::-1]
    assert packed[1:3] == names[1:3]
    assert list(PackedNames.split(packed.joined())) == names
    assert list(pickle.loads(pickle.dumps(packed))) == names
    for place in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            packed[place]


def test_a_nul_does_not_move_the_names_behind_it() -> None:
    assert list(PackedNames(["a\0b", "c"])) == ["a�b", "c"]


def _write_folder(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number:09d}.jpg").touch()


def _write_tar(folder: Path, count: int) -> None:
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for number in range(count):
            archive.addfile(tarfile.TarInfo(f"{number:09d}.jpg"))


@pytest.mark.parametrize("write", [_write_folder, _write_tar])
def test_a_picture_costs_a_source_few_bytes(
    write: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    count = 3000
    write(tmp_path / "pictures", count)
    config = DataConfig(str(tmp_path / "pictures"))
    open_source(config)  # what Python loads at the first call is no picture's
    for remembered in (True, False):  # a tar's list
        if not remembered:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        tracemalloc.start()
        source = open_source(config)
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert isinstance(source, PictureSource)
        assert len(source) == count
        assert source.name(count - 1).endswith(f"{count - 1:09d}.jpg")
        assert held / count < 60  # the name's 14 bytes, its end, and of a tar's member place and size
