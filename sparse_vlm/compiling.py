"""Whether a compiler is looking: what it cannot trace steps aside, or becomes one operator of its graph."""

from __future__ import annotations

import torch


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` traces this very call."""
    compiler = getattr(torch, "compiler", None)  # its test came after torch 2.1
    return bool(compiler is not None and getattr(compiler, "is_compiling", bool)())


def is_exporting() -> bool:
    """Whether ``torch.export`` traces this call, whose result must run without this package."""
    return bool(getattr(getattr(torch, "compiler", None), "is_exporting", bool)())
