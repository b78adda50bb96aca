"""Linear layers in oneDNN's own order of weights: for inference on an x86 CPU.

One picture is a matrix of 49 rows, which the usual kernels multiply at little more than half of their speed;
in bf16 they also put the whole weight into another order at every call. Packing keeps a second copy of the
weights, in the order that oneDNN's kernel reads.

>>> from sparse_vlm.packed import pack_linears
>>> pack_linears(encoder)                        # doctest: +SKIP
50

Names, parameters and files stay what they are. Wherever the packed form does not apply (gradients wanted,
another device or precision, autocast, a compiler, torch.func, a tracer), a layer computes as before. A
weight that changes is packed anew; only a change of few of its values, written through ``weight.data``, may
go unseen.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .agreement import is_plain
from .compiling import is_compiling

# More rows than this keep the usual kernels just as busy.
_MAX_ROWS = {torch.float32: 256, torch.bfloat16: 4096}
# Values of a weight that are compared with what was packed, spread over its diagonal.
_WATCHED = 32


class PackedLinear(nn.Linear):
    """A linear layer with a packed copy of its weight for inference.

    Args:
        linear: the layer whose parameters it shares.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        # The very dictionaries: the handles that callers hold take hooks out of these.
        self.__dict__.update({key: value for key, value in linear.__dict__.items() if "_hooks" in key})
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self._packed: Any = None
        self._packed_from: Callable[[], Tensor | None] | None = None
        self._packed_state: tuple[int, int] = (0, 0)
        self._watched = self._seen = torch.empty(0)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        if not self._applies(input):
            return F.linear(input, self.weight, self.bias)
        return self._multiply(input, self._pack())

    def _applies(self, input: Tensor) -> bool:
        return (
            not is_compiling()
            and not torch.is_grad_enabled()
            and input.device.type == self.weight.device.type == "cpu"
            and input.dtype == self.weight.dtype
            and self._fits(input)
            and not torch.is_autocast_cpu_enabled()
            and is_plain(input)
            and is_plain(self.weight)
            and not self.weight.is_inference()  # such a weight does not tell whether it was changed
        )

    def _pack(self) -> Any:
        # Packed anew after an optimiser step or a load_state_dict. What is written through ``weight.data`` or
        # NumPy leaves no version behind, so a few values are looked at as well.
        weight = self.weight
        state = (weight.data_ptr(), weight._version)
        same = self._packed_from is not None and self._packed_from() is weight
        unchanged = same and state == self._packed_state and torch.equal(self._watched, self._seen)
        if self._packed is None or not unchanged:
            self._packed = self._reorder(weight.detach().contiguous())
            self._packed_from, self._packed_state = weakref.ref(weight), state
            self._watched = weight.detach().diagonal()[:: max(1, min(weight.shape) // _WATCHED)]
            self._seen = self._watched.clone()
        return self._packed

    # The three that another order of weights has its own of (:mod:`sparse_vlm.digits`).

    def _fits(self, input: Tensor) -> bool:
        """Whether the packed form is there for this precision, and faster for this many rows."""
        most = _MAX_ROWS.get(input.dtype, 0) * self.in_features
        return 0 < input.numel() <= most and can_pack(input.dtype)

    def _reorder(self, weight: Tensor) -> Any:
        """The packed copy of a weight (out, in)."""
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def _multiply(self, input: Tensor, packed: Any) -> Tensor:
        """(…, in) to (…, out) by the packed copy."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")
        return output

    def _apply(self, *arguments: Any, **options: Any) -> PackedLinear:
        # Moved or cast, a parameter stays the same object and may come back to the same place.
        self._forget()
        moved: PackedLinear = super()._apply(*arguments, **options)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the packed weight behind and make their own when they need it."""
        gone = {"_packed": None, "_packed_from": None, "_watched": torch.empty(0), "_seen": torch.empty(0)}
        return {**self.__dict__, **gone}

    def _forget(self) -> None:
        self._packed = self._packed_from = None
        self._watched = self._seen = torch.empty(0)


@functools.cache
def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether PyTorch and processor have oneDNN's packed linear layers as used here: tried once, small.

    Args:
        dtype: of weights and input; only fp32 and bf16 are ever packed.
    """
    if dtype not in _MAX_ROWS:
        return False
    ones = torch.ones(2, 2, dtype=dtype)
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(ones)
        output = torch.ops.mkldnn._linear_pointwise(ones, weight, None, "none", [], "")
    except (AttributeError, RuntimeError):  # not built with it, or an older release's other form
        return False
    return bool(torch.equal(output, 2 * ones))


def pack_linears(module: nn.Module) -> int:
    """Replace the linear layers below a module by packed ones, in place.

    Args:
        module: an encoder, usually. It takes twice the memory afterwards.

    Returns:
        How many layers were replaced; 0 where PyTorch has no oneDNN, or weights were made under
        ``torch.inference_mode()``.
    """
    return replace_linears(module, PackedLinear) if can_pack() else 0


def replace_linears(module: nn.Module, build: Callable[[nn.Linear], nn.Module]) -> int:
    """Replace the linear layers below a module, in place.

    Args:
        module: what holds them; layers packed in another way are replaced too, other kinds of linear layers
            (adapters, quantized ones, pruned ones) are left alone.
        build: makes the new layer from the old one.

    Returns:
        How many were replaced.
    """
    count = 0
    for child in list(module.modules()):
        for name, linear in list(child.named_children()):
            if not isinstance(linear, PackedLinear) and type(linear) is not nn.Linear:
                continue
            # What a pruned layer, say, makes its weight of at every call would be lost.
            if linear._parameters.keys() - {"weight", "bias"} or linear._buffers:
                continue
            # Weights made in inference mode do not tell when they change: a copy could be an old one.
            if not linear.weight.is_inference():
                setattr(child, name, build(linear))
                count += 1
    return count
