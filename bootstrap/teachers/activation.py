"""A teacher's QuickGELU as one kernel where there is one."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_vlm.activations import quick_gelu
from sparse_vlm.agreement import has_kernels

# What timm, open_clip and transformers call it.
_NAMES = ("QuickGELU", "QuickGELUActivation")


class FusedQuickGelu(nn.Module):
    """QuickGELU in one pass over memory on a GPU, and the library's own elsewhere.

    Args:
        own: the library's.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, values: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if has_kernels(values):
            return quick_gelu(values)
        activated: Tensor = self.own(values)
        return activated


def fuse_quick_gelu(trunk: nn.Module) -> int:
    """Put :class:`FusedQuickGelu` into every place of a QuickGELU below ``trunk``; returns how many."""
    found = [
        (parent, name, child)
        for parent in trunk.modules()
        if not isinstance(parent, FusedQuickGelu)
        for name, child in parent.named_children()
        if type(child).__name__ in _NAMES
    ]
    for parent, name, child in found:
        setattr(parent, name, FusedQuickGelu(child))
    return len(found)
