"""Nothing tracked names a folder of somebody's machine or the host of a package index."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Written in pieces, so that this file passes its own test.
FOLDERS = "|".join(["work", "root", "tmp", "home", "Users", "scratch"])
FOLDER = re.compile(rf"(?<![\w.\-/:}})<>*])/({FOLDERS})/")
HALVES = [
    ("py", r"pi\.org"),
    ("python", r"hosted\.org"),
    ("download.py", r"torch\.org"),
    ("extra-", "index-url"),
]
HOST = re.compile("|".join(first + rest for first, rest in HALVES))


def tracked(root: Path) -> list[Path]:
    """Files in git, or those that a commit of everything would add."""
    if not shutil.which("git") or not (root / ".git").exists():
        pytest.skip("needs a git checkout")
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    return [root / name for name in listed if name and (root / name).is_file()]


def find_traces(path: Path) -> list[str]:
    """Lines of a text file that name a machine; a binary file has none."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        return []
    named = [(n, line) for n, line in enumerate(lines, 1) if FOLDER.search(line) or HOST.search(line)]
    return [f"{path.name}:{n}: {line.strip()}" for n, line in named]


def test_no_tracked_file_names_a_machine() -> None:
    paths = tracked(ROOT)
    assert len(paths) > 20
    assert [trace for path in paths for trace in find_traces(path)] == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("open('/wo", "rk/data/a.png')"),
        ("cd /ro", "ot/x"),
        ("-o /t", "mp/out.png"),
        ("see https://py", "pi.org/project/x"),
    ],
)
def test_a_planted_trace_is_found(tmp_path: Path, before: str, after: str) -> None:
    line = before + after
    (tmp_path / "a.py").write_text(f"first = 1\n{line}\n")
    assert find_traces(tmp_path / "a.py") == [f"a.py:2: {line}"]


@pytest.mark.parametrize(
    "line", ["images/work/a.png", "runs/tmp/", "https://example.org/home/", "a / root / b"]
)
def test_a_relative_path_is_no_trace(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.py").write_text(line)
    assert find_traces(tmp_path / "a.py") == []
