"""Files and directories that appear whole or not at all, whatever kills the process meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Seconds; far longer than a living writer takes from one rename to the next.
_BETWEEN_RENAMES = 1.0


def write_atomic(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], object]) -> None:
    """Writes a file so that its name holds either the old or the whole new content at every moment.

    The content goes to a temporary file in the same folder, is flushed to the disk and then renamed. Missing
    parent folders are made. Temporary files of writers that were killed are swept away by the next write.

    Args:
        path: The file to write; a symbolic link is followed.
        content: Bytes, text (UTF-8), or a function that writes to the temporary path it is given. That path
            has the suffix of `path`, so writers that read the format off the name work.

    Raises:
        OSError: If the disk is full (errno ENOSPC) or the file cannot be written; the old content is intact.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "expected the name of a file, but this is a directory", str(target)
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary = _temporary_name(target, target.suffix)
    with _explained(target, temporary):
        if callable(content):
            temporary.touch()
            usual = temporary.stat().st_mode
            temporary.unlink()
            content(temporary)
            _open_up(temporary, usual)
        else:
            temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], owned: Collection[str] | None = None) -> Iterator[Path]:
    """Builds a directory under a temporary name and renames it into place when the block ends well.

    An older directory of that name stays whole until the new one takes its place, and is then deleted; if
    the block raises, the older one stays. Missing parent folders are made.

    Args:
        path: The directory to make or to replace.
        owned: Glob patterns of the entries an older directory may hold. If it holds anything else, it is
            refused before any work is done. None replaces whatever is there.

    Yields:
        The temporary directory to fill.

    Raises:
        FileExistsError: If the older directory holds entries that are not `owned`.
        NotADirectoryError: If `path` is a file.
        OSError: If the disk is full (errno ENOSPC) or something cannot be written, also where safetensors
            says so in a class of its own.
    """
    target = Path(path).resolve()
    recover_directory(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "expected the name of a directory, but this is a file", str(target)
        )
    if owned is not None and target.is_dir():
        names = sorted(entry.name for entry in target.iterdir())
        foreign = [n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in owned)]
        if foreign:
            listed = ", ".join(foreign[:5])
            reason = f"the directory holds other files ({listed}) that would be lost; name another one"
            raise FileExistsError(errno.EEXIST, reason, str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary = _temporary_name(target, "")
    with _explained(target, temporary):
        temporary.mkdir()
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _open_up(Path(folder, name), temporary.stat().st_mode)
                _sync(Path(folder, name))
            _sync(Path(folder))
        _put_in_place(temporary, target)
        _sync(target.parent)


def recover_directory(path: str | os.PathLike[str]) -> bool:
    """Puts back an older directory that a killed `atomic_directory` had moved aside; True if it did.

    Only needed where the file system cannot exchange two names in one step: there a kill between the two
    renames leaves the older directory under a hidden name. It takes a second then.
    """
    target = Path(path).resolve()
    if target.exists() or not target.parent.is_dir():
        return False
    # The dots tell it from what belongs to a longer name: ".name.v2.host-1-abc.aside".
    found = target.parent.glob(f".{_escape(target.name)}.*.aside")
    ours = [path for path in found if path.name.count(".") == target.name.count(".") + 3]
    if not ours:
        return False
    # A writer that lives, here or on another machine, is between its two renames for a moment only.
    end = time.monotonic() + _BETWEEN_RENAMES
    while time.monotonic() < end:
        if target.exists():
            return False
        time.sleep(_BETWEEN_RENAMES / 20)
    max(ours, key=lambda path: path.stat().st_mtime).rename(target)
    return True


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    elif _exchange(temporary, target):
        shutil.rmtree(temporary)
    else:
        aside = temporary.with_suffix(".aside")
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        _sync(target.parent)
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step (Linux renameat2); False where system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return int(renameat2(*arguments)) == 0


@contextlib.contextmanager
def _explained(target: Path, temporary: Path) -> Iterator[None]:
    """Removes the temporary on any error, and gives a full disk one clear sentence."""
    try:
        yield
    except BaseException as error:
        full = _is_disk_full(error, target.parent)
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        if full:
            reason = "the disk is full; make room and run the command again (what was there before is intact)"
            raise OSError(errno.ENOSPC, reason, str(target)) from error
        number = _system_errno(error)
        if number is not None and not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), str(target)) from error
        raise


@contextlib.contextmanager
def explain_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives a full disk one clear sentence, for writes into files that grow where they are.

    Args:
        path: The file that is written.

    Raises:
        OSError: If the disk is full (errno ENOSPC), naming the file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = "the disk is full; make room and run the command again"
        raise OSError(errno.ENOSPC, reason, str(path)) from error


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    number = _system_errno(error)
    if number is not None or not isinstance(error, Exception):
        return number in (errno.ENOSPC, errno.EDQUOT)
    # torch wraps the system's error in a class of its own, and loses its text.
    return "No space left on device" in str(error) or shutil.disk_usage(folder).free < 4096


def _system_errno(error: BaseException) -> int | None:
    """The system's number of an error, which safetensors has in the text of a class of its own."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"while serializing: .*\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _temporary_name(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp{suffix}")


def _sweep(target: Path) -> None:
    """Deletes what writers of `target` that no longer live, on this machine, have left.

    Where the target is there, that is also an older directory moved aside: with the target deleted one day,
    it would come back.
    """
    kinds = ("tmp*", "aside") if target.exists() else ("tmp*",)
    left = f".{_escape(target.name)}.{_escape(_host())}-*-*."
    for entry in [entry for kind in kinds for entry in target.parent.glob(left + kind)]:
        writer = entry.name.removeprefix(f".{target.name}.{_host()}-").partition("-")[0]
        if not writer.isdigit() or _is_alive(int(writer)):
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # there os.kill(pid, 0) would end the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _host() -> str:
    return re.sub(r"[-/.]", "_", socket.gethostname())


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _open_up(file: Path, like: int) -> None:
    """Gives a file the permissions of others around it: safetensors writes for the owner alone."""
    mode = file.stat().st_mode
    file.chmod(stat.S_IMODE(mode | (like & 0o666)))


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
