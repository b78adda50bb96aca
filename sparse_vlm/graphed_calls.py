"""CUDA graphs of a function of pictures, recorded as its calls come."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Output = TypeVar("Output")


class _Recording(NamedTuple):
    replay: Callable[[], None]
    images: Tensor
    output: Any


class GraphedCalls(Generic[Output]):
    """Calls a function of pictures through CUDA graphs: one for each shape, settings and autocast.

    The first call of a kind records (and takes as long as a few plain calls); later ones replay. A graph
    reads the weights where they lie, so values changed in place count, and weights that were moved, cast or
    exchanged are recorded anew. A whole part that is exchanged is not seen: begin anew yourself. Each graph
    keeps the memory of its activations. Several threads take turns.

    Args:
        function: of pictures (B, 3, H, W) on a CUDA device and of settings; gives out tensors, None, and
            (named) tuples and mappings of such. No gradients are taken.
        module: whose parameters and buffers are all that it reads beside the pictures.
        keep: most graphs to keep; the one unused for longest is dropped.

    Raises:
        ValueError: if ``keep`` is less than one; from a call, if the weights are not on one CUDA device.
    """

    def __init__(self, function: Callable[..., Output], module: nn.Module, keep: int = 8) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.function = function
        self.keep = keep
        # Where they are kept, not what they are: others may come into their places.
        self._places = [
            (kept, name)
            for part in module.modules()
            for kept in (part._parameters, part._buffers)
            for name, value in kept.items()
            if value is not None
        ]
        self._forget()

    def _forget(self) -> None:
        self._addresses: tuple[int, ...] = ()
        self._recordings: OrderedDict[tuple[Hashable, ...], _Recording] = OrderedDict()
        self._turn = threading.Lock()
        self._last: torch.cuda.Event | None = None

    def __call__(self, images: Tensor, *settings: Hashable) -> Output:
        """What ``function(images, *settings)`` gives out, as tensors of the caller's own."""
        # Never inference tensors: a projector that is trained behind a frozen encoder saves what it reads.
        with self._turn, torch.inference_mode(False), torch.no_grad():
            return self._run(images, settings)

    def __getstate__(self) -> dict[str, Any]:
        """A copy records for itself."""
        return {name: self.__dict__[name] for name in ("function", "keep", "_places")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`."""
        self.__dict__.update(state)
        self._forget()

    def _weights(self) -> list[Tensor]:
        return [tensor for kept, name in self._places if (tensor := kept.get(name)) is not None]

    def _run(self, images: Tensor, settings: tuple[Hashable, ...]) -> Output:
        addresses = tuple(weight.data_ptr() for weight in self._weights())
        if addresses != self._addresses:
            self._recordings.clear()
            self._check_devices()
            self._addresses = addresses
        key = (tuple(images.shape), images.dtype, settings, *_autocast())
        recording = self._recordings.pop(key, None)
        if recording is None:
            recording = self._record(images, settings)
            while len(self._recordings) >= self.keep:
                self._recordings.popitem(last=False)
        self._recordings[key] = recording
        cuda = recording.images.is_cuda
        stream = torch.cuda.current_stream(recording.images.device) if cuda else None
        if stream is not None and self._last is not None:
            stream.wait_event(self._last)  # of the call before, which may have come on another stream
        recording.images.copy_(images)
        recording.replay()
        # The next replay writes over the graph's own output.
        output: Output = _copy(recording.output)
        if stream is not None:
            self._last = stream.record_event()
        return output

    def _check_devices(self) -> None:
        devices = sorted({str(weight.device) for weight in self._weights()})
        if len(devices) != 1 or not devices[0].startswith("cuda"):
            raise ValueError(
                f"a CUDA graph needs all weights on one CUDA device, they are on {' and '.join(devices)}"
            )

    def _record(self, images: Tensor, settings: tuple[Hashable, ...]) -> _Recording:
        held = images.to(self._weights()[0].device, copy=True)
        enabled, dtype = _autocast()
        # Autocast keeps cast weights until it ends; a graph would go on reading them afterwards.
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            replay, output = _capture(lambda: self.function(held, *settings), held)
        return _Recording(replay, held, output)


def _autocast() -> tuple[bool, torch.dtype]:
    """What decides the kernels beside the arguments: whether autocast is on, and its precision."""
    ask = getattr(torch, "get_autocast_dtype", None)  # came after torch 2.1, which has the other one
    return torch.is_autocast_enabled(), ask("cuda") if ask else torch.get_autocast_gpu_dtype()


def _capture(work: Callable[[], Output], pictures: Tensor) -> tuple[Callable[[], None], Output]:
    """A graph of ``work`` on those pictures: what replays it, and the output that every replay writes."""
    with torch.cuda.device(pictures.device):
        # Libraries allocate and choose their kernels in the first calls, which a graph must not record.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what they do on the device: loaders pin memory, for instance.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = work()
    return graph.replay, output


def _copy(output: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        return type(output)(**{name: _copy(part) for name, part in output.items()})
    if isinstance(output, tuple):
        parts = [_copy(part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output
