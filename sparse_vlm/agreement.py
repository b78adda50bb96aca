"""A kernel of our own is used after it has said on a small problem what PyTorch's own operations say."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .compiling import is_compiling
from .rois import at_least_fp32

DEVICES = ("cuda",)
"""Kinds of devices that the kernels are for."""


def has_kernels(tensor: Tensor) -> bool:
    """Whether a tensor lies where kernels of our own may run; the wrapped ones of torch.func lie nowhere."""
    if tensor.device.type not in DEVICES:
        return False
    return is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def agree(
    name: str,
    kernel: Callable[[], Sequence[Tensor]],
    plain: Callable[[], Sequence[Tensor]],
    tolerance: float,
) -> bool:
    """Whether a kernel runs here and says what the plain path says; a warning where it does not.

    Args:
        name: the kernel, for the warning.
        kernel: its results for a problem.
        plain: what they should be.
        tolerance: largest difference, as a share of the largest value of each result.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.no_grad():
            pairs = [(at_least_fp32(o), at_least_fp32(p)) for o, p in zip(kernel(), plain(), strict=True)]
            shares = [float((own - wanted).abs().max() / wanted.abs().max()) for own, wanted in pairs]
    except Exception as error:  # a compiler or driver that will not do
        warnings.warn(f"{name} does not run here and is left out: {error}", stacklevel=3)
        return False
    wrong = [share for share in shares if not share <= tolerance]  # one that is no number, too
    if wrong:
        difference = wrong[0]
        warnings.warn(f"{name} differs by {difference:.1e} here and is left out", stacklevel=3)
        return False
    return True
