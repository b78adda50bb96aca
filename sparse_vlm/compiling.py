"""Whether a compiler is looking: what it cannot trace steps aside, or becomes one operator of its graph."""

from __future__ import annotations

import torch

TRACES_FUNCTIONS = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 6)
"""Whether this PyTorch's compiler traces autograd functions that have a ``setup_context``."""


def is_compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` traces this very call."""
    # The test came after torch 2.1.
    return hasattr(torch.compiler, "is_compiling") and bool(torch.compiler.is_compiling())


def is_exporting() -> bool:
    """Whether ``torch.export`` traces this call, whose result must run without this package."""
    # Not torch.compiler.is_exporting(), which several releases of its compiler (2.11, say) take for true.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))
