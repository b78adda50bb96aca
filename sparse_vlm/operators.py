"""Functions of our own as PyTorch operators: a compiler and vmap take them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARIES: dict[str, Any] = {}


def register(
    module: str, name: str, schema: str, run: Callable[..., Any], shape: Callable[..., Any]
) -> Any | None:
    """Make an operator of a function without side effects and gradients.

    Args:
        module: ``__name__`` of the module it is in. A model directory may bring the same code a second
            time, under another name.
        name: its name there.
        schema: its arguments and results, as PyTorch writes them.
        run: the function.
        shape: makes empty results of the right shape, for a compiler.

    Returns:
        The operator, or None before torch 2.4, whose operators know no shapes.
    """
    if not hasattr(torch.library, "register_fake"):
        return None
    space = module.replace(".", "_")
    _LIBRARIES.pop(f"{space}::{name}", None)  # a module that is loaded again
    # Not custom_op, which has a word of its own in autograd and cannot be differentiated by torch.func.
    library = _LIBRARIES[f"{space}::{name}"] = torch.library.Library(space, "FRAGMENT")
    library.define(f"{name}{schema}")
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{space}::{name}", shape, lib=library)
    return getattr(getattr(torch.ops, space), name).default
