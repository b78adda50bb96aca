"""Atomic writes: nothing old is lost or half-written, also when the process is killed or the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sparse_vlm import atomic
from sparse_vlm.atomic import atomic_directory, recover_directory, write_atomic

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes with SIGKILL")
ROOT = Path(__file__).resolve().parents[2]


def run_until_killed(code: str, *arguments: Path) -> None:
    """Runs a script that ends itself with SIGKILL."""
    # A bare package stands in for the real one, so that these subprocesses do not wait for torch.
    head = "import os, signal, sys, types\nfrom pathlib import Path\n"
    head += "package = types.ModuleType('sparse_vlm'); package.__path__ = [sys.argv[1]]\n"
    head += "sys.modules['sparse_vlm'] = package\nfrom sparse_vlm import atomic\n"
    head += "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
    command = [
        sys.executable,
        "-c",
        head + textwrap.dedent(code),
        str(ROOT / "sparse_vlm"),
        *map(str, arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("new", ["new", b"new"])
def test_a_file_is_written_and_replaced(tmp_path: Path, new: str | bytes) -> None:
    path = tmp_path / "deep" / "down" / "a.json"
    write_atomic(path, "a longer old text")
    write_atomic(path, new)
    assert content(tmp_path) == {"deep/down/a.json": "new"}


def test_a_function_gets_a_path_with_the_same_suffix(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(path: Path) -> None:
        seen.append(path)
        path.write_text("whole")

    write_atomic(tmp_path / "picture.png", write)
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path
    assert content(tmp_path) == {"picture.png": "whole"}


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_a_library_writes_for_its_owner_alone_gets_the_usual_permissions(
    tmp_path: Path, umask: int
) -> None:
    def secret(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.write_text("weights")
        path.chmod(0o600)

    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", secret)
        with atomic_directory(tmp_path / "folder") as folder:
            (folder / "deep").mkdir()
            secret(folder / "deep" / "file")
            (folder / "script").touch(mode=0o700)
    finally:
        os.umask(before)
    for file in (tmp_path / "file", tmp_path / "folder" / "deep" / "file"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder" / "script").stat().st_mode & 0o100


def test_an_error_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyError("broken")

    write_atomic(tmp_path / "a", "old")
    with pytest.raises(KeyError, match="broken"):
        write_atomic(tmp_path / "a", fail)
    assert content(tmp_path) == {"a": "old"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path, error: Exception) -> None:
    def fill(path: Path) -> None:
        path.write_text("half")
        raise error

    write_atomic(tmp_path / "a", "old")
    with pytest.raises(OSError, match="the disk is full; make room") as caught:
        write_atomic(tmp_path / "a", fill)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    with pytest.raises(OSError, match="the disk is full"), atomic_directory(tmp_path / "d") as folder:
        fill(folder / "weights")
    assert content(tmp_path) == {"a": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_fills_at_the_last_flush_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "a", "old")

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is full"):
        write_atomic(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "old"}


def test_what_the_system_told_safetensors_is_an_error_of_the_system(tmp_path: Path) -> None:
    said = "Error while serializing: I/O error: File too large (os error 27)"
    with pytest.raises(OSError, match="File too large") as caught, atomic_directory(tmp_path / "d"):
        raise SafetensorError(said)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "d"))
    with pytest.raises(SafetensorError, match="no tensors"), atomic_directory(tmp_path / "d"):
        raise SafetensorError("no tensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        path.symlink_to("/dev/full")
        path.write_bytes(b"x" * 10)

    write_atomic(tmp_path / "a", "old")
    with pytest.raises(OSError, match="the disk is full"):
        write_atomic(tmp_path / "a", fill)
    assert content(tmp_path) == {"a": "old"}


def test_a_kill_in_the_middle_leaves_the_old_file_and_the_next_write_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_text("old")
    code = """
    def half(path):
        path.write_text("ha")
        die()
    atomic.write_atomic(Path(sys.argv[2]), half)
    """
    run_until_killed(code, path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2, "the killed writer's temporary"
    write_atomic(path, "new")
    assert content(tmp_path) == {"model.bin": "new"}


def test_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("outer")
        write_atomic(tmp_path / "a", "inner")

    write_atomic(tmp_path / "a", write)
    assert content(tmp_path) == {"a": "outer"}


def test_a_directory_is_made_and_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "encoder"
    for entries in ({"a": "1", "sub/b": "2"}, {"a": "3"}):
        with atomic_directory(target) as folder:
            assert folder.parent == target.parent
            for name, text in entries.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
        assert content(target) == entries
        assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_the_old_directory(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "a").write_text("old")

    def interrupted() -> None:
        with atomic_directory(tmp_path / "d") as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(tmp_path) == {"d/a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_other_peoples_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\)"),
        atomic_directory(tmp_path, owned=("config.json", "*.safetensors")),
    ):
        pytest.fail("the block must not run")
    assert content(tmp_path) == {"thesis.tex": "years of work"}


def test_a_file_is_no_directory_and_a_directory_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="this is a file"), atomic_directory(tmp_path / "file"):
        pytest.fail("the block must not run")
    with pytest.raises(IsADirectoryError, match="this is a directory"):
        write_atomic(tmp_path, "x")


DIRECTORY = """
{before}
with atomic.atomic_directory(Path(sys.argv[2])) as folder:
    (folder / "a").write_text("new a")
    {within}
    (folder / "b").write_text("new b")
"""
NO_EXCHANGE = "atomic._exchange = lambda first, second: False; "
DIE_AFTER_FIRST_RENAME = (
    "rename = Path.rename\ndef once(path, target):\n    rename(path, target); die()\nPath.rename = once\n"
)
DIE_BEFORE_SWEEPING = "import shutil; shutil.rmtree = lambda path: die()"


@pytest.mark.parametrize(
    ("before", "within", "expected"),
    [
        ("", "die()", "old"),
        ("atomic._put_in_place = lambda new, target: die()", "", "old"),
        (DIE_BEFORE_SWEEPING, "", "new"),
        (NO_EXCHANGE + DIE_BEFORE_SWEEPING, "", "new"),
    ],
    ids=["while building", "before the rename", "after the exchange", "after both renames"],
)
def test_a_kill_leaves_one_whole_directory(tmp_path: Path, before: str, within: str, expected: str) -> None:
    target = tmp_path / "encoder"
    with atomic_directory(target) as folder:
        for name in "ab":
            (folder / name).write_text(f"old {name}")
    run_until_killed(DIRECTORY.format(before=before, within=within), target)
    assert content(target) == {"a": f"{expected} a", "b": f"{expected} b"}


def test_a_kill_between_two_renames_is_recovered(tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("old a")
    run_until_killed(DIRECTORY.format(before=NO_EXCHANGE + "\n" + DIE_AFTER_FIRST_RENAME, within=""), target)
    assert not target.exists()
    assert recover_directory(target)
    assert content(target) == {"a": "old a"}
    assert not recover_directory(target)
    with atomic_directory(target) as folder:
        (folder / "a").write_text("newest")
    assert content(tmp_path) == {"encoder/a": "newest"}


def test_an_older_directory_does_not_come_back_once_it_was_replaced(tmp_path: Path) -> None:
    target = tmp_path / "encoder"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("old a")
    run_until_killed(DIRECTORY.format(before=NO_EXCHANGE + DIE_BEFORE_SWEEPING, within=""), target)
    assert len(list(tmp_path.iterdir())) == 2, "the new directory, and the old one aside"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("newest")
    assert content(tmp_path) == {"encoder/a": "newest"}
    shutil.rmtree(target)
    assert not recover_directory(target)


def test_another_directorys_leftovers_are_left_to_it(tmp_path: Path) -> None:
    aside = tmp_path / ".encoder.v2.host-1-abc.aside"
    aside.mkdir()
    assert not recover_directory(tmp_path / "encoder")
    assert recover_directory(tmp_path / "encoder.v2")
    assert not aside.exists()


def test_without_exchange_a_directory_is_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "d") as folder:
            (folder / "a").write_text(text)
    assert content(tmp_path) == {"d/a": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_names_with_glob_characters_are_plain_names(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a[1]*.txt", "x")
    with atomic_directory(tmp_path / "d[2]?") as folder:
        (folder / "a").write_text("y")
    assert content(tmp_path) == {"a[1]*.txt": "x", "d[2]?/a": "y"}


def test_a_reader_does_not_come_between_the_renames_of_a_living_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)  # as on NFS
    target, second, both = tmp_path / "encoder", threading.Event(), threading.Event()
    with atomic_directory(target) as folder:
        (folder / "old").write_text("")
    rename = Path.rename

    def slow(self: Path, to: Path) -> Path:
        made = rename(self, to)
        if to.suffix == ".aside":
            second.set()
            time.sleep(0.3)
        return made

    def write() -> None:
        with atomic_directory(target) as folder:
            (folder / "new").write_text("")
        both.set()

    monkeypatch.setattr(Path, "rename", slow)
    writer = threading.Thread(target=write)
    writer.start()
    assert second.wait(10)
    assert not recover_directory(target)
    writer.join()
    assert both.is_set(), "the writer failed"
    assert [entry.name for entry in target.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]
