"""A kernel of our own is used after it has said on a small problem what PyTorch's own operations say."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .compiling import is_compiling

DEVICES = ("cuda",)
"""Kinds of devices that the kernels are for."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has numbers of its own in memory, for code that PyTorch knows nothing of.

    Those of torch.func, of forward-mode gradients, of TorchScript's tracer and of other subclasses (shards,
    shapes without numbers) have not.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
    )


def has_kernels(tensor: Tensor) -> bool:
    """Whether a tensor lies where kernels of our own may run."""
    return tensor.device.type in DEVICES and (is_compiling() or is_plain(tensor))


def may_infer(tensor: Tensor) -> bool:
    """Whether kernels without gradients may be asked; a compiler makes its own of the plain words."""
    return not is_compiling() and has_kernels(tensor) and not torch.is_grad_enabled()


class AskedOnce:
    """A question with yes or no, by the kind of problem; the answer is remembered.

    Not that of a bad moment (no memory left, a CUDA graph being captured, within torch.func's vmap): it is no
    for this time.

    Args:
        question: see :func:`agree`.
    """

    def __init__(self, question: Callable[..., bool]) -> None:
        self.question = question
        self.answers: dict[Hashable, bool] = {}

    def __call__(self, *kind: Hashable) -> bool:
        """The answer for a kind of problem."""
        if kind not in self.answers:
            if _is_bad_moment():
                return False
            try:
                self.answers[kind] = self.question(*kind)
            except torch.cuda.OutOfMemoryError:
                return False
        return self.answers[kind]


def _is_bad_moment() -> bool:
    """Whether an answer could not be waited for, or drawn for, now."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    level = getattr(torch._C._functorch, "maybe_current_level", lambda: None)
    return level() is not None


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

    Raises:
        torch.cuda.OutOfMemoryError: as it comes; it says nothing of the kernel.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        with torch.no_grad():
            pairs = [(own.double(), wanted.double()) for own, wanted in zip(kernel(), plain(), strict=True)]
            shares = [float((own - wanted).abs().max() / wanted.abs().max()) for own, wanted in pairs]
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler or driver that will not do
        warnings.warn(f"{name} does not run here and is left out: {error}", stacklevel=4)
        return False
    wrong = [share for share in shares if not share <= tolerance]  # one that is no number, too
    if wrong:
        difference = wrong[0]
        warnings.warn(f"{name} differs by {difference:.1e} here and is left out", stacklevel=4)
        return False
    return True


def build_drawer(device: torch.device | str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Random tensors of the same numbers everywhere; no global random state moves."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)
