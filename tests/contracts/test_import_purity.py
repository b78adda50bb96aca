"""Importing us changes nothing: no logging set-up, no environment writes, no seed, no socket, no handler."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sparse_vlm", "bootstrap", "llm_integration", "eval")

# Run in a fresh process: import what others made, look, import what is ours, look again.
PROBE = """
import importlib, json, sys

theirs, ours = json.loads(sys.argv[1])
for name in theirs:
    try:
        importlib.import_module(name)
    except Exception:
        pass

import logging, os, random, signal, warnings

def state():
    import numpy, torch
    root = logging.getLogger()
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
        "root log handlers": [repr(h) for h in root.handlers],
        "root log level": [root.level, root.disabled, logging.root.manager.disable],
        "warning filters": [repr(f) for f in warnings.filters],
        "Python's random state": hash(random.getstate()),
        "NumPy's random state": repr(numpy.random.get_state()),
        "torch's random state": torch.get_rng_state().tolist(),
        "torch's default dtype": repr(torch.get_default_dtype()),
        "torch's threads": torch.get_num_threads(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "torch's switches": [torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()],
        "signal handlers": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "exception hook": repr(sys.excepthook),
    }

sockets = []
before = state()
sys.addaudithook(lambda event, arguments: sockets.append(event) if event.startswith("socket.") else None)
skipped = []
for name in ours:
    try:
        importlib.import_module(name)
    except ImportError as error:
        # A plug-in for a program that is not installed here cannot be looked at.
        if (error.name or "").partition(".")[0] in ("sparse_vlm", "bootstrap", "llm_integration", "eval", ""):
            raise
        skipped.append(f"{name}: {error}")
after = state()
json.dump(
    {
        "changed": [key for key in before if before[key] != after[key]],
        "sockets": sorted(set(sockets)),
        "skipped": skipped,
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    },
    open(sys.argv[2], "w"),
)
"""


def third_party(*packages: str) -> list[str]:
    """Dotted names that modules of ours import from elsewhere at their top."""
    names = set()
    for path in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    return sorted(name for name in names if name.partition(".")[0] not in (*PACKAGES, "__future__"))


def modules(package: str) -> list[str]:
    """Every module of a package, `__main__` aside."""
    paths = (p.relative_to(ROOT).with_suffix("") for p in (ROOT / package).rglob("*.py"))
    dotted = (".".join(p.parts).removesuffix(".__init__") for p in paths if p.name != "__main__")
    return sorted(dotted)


def probe(theirs: list[str], ours: list[str], folder: Path) -> dict[str, Any]:
    """Imports in a fresh process and says what has changed."""
    answer = folder / "answer.json"
    command = [sys.executable, "-c", PROBE, json.dumps([theirs, ours]), str(answer)]
    path = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(answer.read_text())
    return said


def test_the_library_pulls_in_nothing_heavy(tmp_path: Path) -> None:
    said = probe(["torch", "numpy"], modules("sparse_vlm"), tmp_path)
    assert (said["changed"], said["sockets"], said["skipped"]) == ([], [], [])
    heavy = {"transformers", "timm", "open_clip", "torchvision", "yaml", "matplotlib", "webdataset"}
    assert heavy & set(said["modules"]) == set()


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_importing_every_module_changes_nothing(tmp_path: Path, package: str) -> None:
    # What the packages below it import counts as there already: `eval` uses all of them.
    below = PACKAGES if package == "eval" else ("sparse_vlm", package)
    said = probe(third_party(*below), modules(package), tmp_path)
    assert (said["changed"], said["sockets"]) == ([], [])


PLANTED = """
import logging, os, random, signal, socket
import numpy, torch
os.environ["A_NEW_NAME"] = "1"
logging.basicConfig(level=10)
random.random()
numpy.random.rand()
torch.manual_seed(0)
torch.set_grad_enabled(False)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
socket.socket().close()
"""


def test_planted_changes_are_seen(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    said = probe(["torch", "numpy"], ["planted"], tmp_path)
    assert said["changed"] == [
        "environment",
        "root log handlers",
        "root log level",
        "Python's random state",
        "NumPy's random state",
        "torch's random state",
        "torch's gradient mode",
        "signal handlers",
    ]
    assert said["sockets"] == ["socket.__new__"]
