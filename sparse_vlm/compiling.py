"""Whether a compiler is looking: fast paths of our own step aside, since it fuses the plain path itself."""

from __future__ import annotations

import torch


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` traces this very call."""
    compiler = getattr(torch, "compiler", None)  # its test came after torch 2.1
    return bool(compiler is not None and getattr(compiler, "is_compiling", bool)())
