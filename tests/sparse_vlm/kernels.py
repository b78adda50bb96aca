"""Triton kernels without a GPU, in processes of their own: the interpreter is chosen when Triton loads."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.metadata.version("triton") < "3",
    reason="needs Triton 3",
)
needs_operators = pytest.mark.skipif(
    not hasattr(torch.library, "register_fake"), reason="torch's operators know shapes since 2.4"
)
# A kernel that is left out says so, and everything goes on without it.
_STRICT = """
import warnings
warnings.filterwarnings("error", module="sparse_vlm")
warnings.filterwarnings("ignore", "There is a performance drop")
"""


def run_python(code: str, **environment: str) -> str:
    """What a program prints; that it fails, or this package warns, fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", _STRICT + code],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
