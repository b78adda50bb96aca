"""CUDA graphs: what is recorded when, on stand-ins here, and the real thing on a GPU."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sparse_vlm import build_encoder
from sparse_vlm.graphed_calls import GraphedCalls
from sparse_vlm.graphs import GraphedEncoder

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class _Seen(NamedTuple):
    doubled: Tensor
    more: tuple[Tensor, ...]
    nothing: None


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, images: Tensor, times: int = 1) -> _Seen:
        return _Seen(images * self.weight, (images.sum(),) * times, None)


def _build(keep: int = 8) -> tuple[_Twice, GraphedCalls[_Seen]]:
    module = _Twice()
    return module, GraphedCalls(module, module, keep)


def test_one_recording_for_each_kind_of_call(stand_in_graphs: list[tuple[int, ...]]) -> None:
    _, calls = _build()
    for pictures in (torch.ones(1, 3), torch.ones(2, 3), torch.zeros(1, 3)):
        seen = calls(pictures)
        assert isinstance(seen, _Seen)
        assert torch.equal(seen.doubled, 2 * pictures)
        assert seen.nothing is None
    assert stand_in_graphs == [(1, 3), (2, 3)]
    assert len(calls(torch.ones(1, 3), 2).more) == 2
    calls(torch.ones(1, 3).double())
    assert len(stand_in_graphs) == 4


def test_output_is_the_callers_own(stand_in_graphs: list[tuple[int, ...]]) -> None:
    _, calls = _build()
    with torch.inference_mode():
        first = calls(torch.ones(1, 3))
        calls(torch.zeros(1, 3))
    assert torch.equal(first.doubled, torch.full((1, 3), 2.0))
    assert first.more[0] == 3
    # A layer that is trained behind it saves what it reads, which it may not do with inference tensors.
    layer = nn.Linear(3, 3)
    layer(calls(torch.ones(1, 3)).doubled).sum().backward()
    assert layer.weight.grad is not None
    assert len(stand_in_graphs) == 1


def test_the_one_unused_for_longest_is_dropped(stand_in_graphs: list[tuple[int, ...]]) -> None:
    _, calls = _build(keep=2)
    for size in (1, 2, 1, 3, 1, 2):
        calls(torch.ones(size, 3))
    assert [shape[0] for shape in stand_in_graphs] == [1, 2, 3, 2]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        _build(keep=0)


def test_weights_that_move_are_recorded_anew(stand_in_graphs: list[tuple[int, ...]]) -> None:
    module, calls = _build()
    calls(torch.ones(1, 3))
    with torch.no_grad():
        module.weight.fill_(5.0)
    assert calls(torch.ones(1, 3)).doubled[0, 0] == 5
    assert len(stand_in_graphs) == 1
    module.double()
    assert calls(torch.ones(1, 3)).doubled.dtype == torch.float64
    assert len(stand_in_graphs) == 2


def test_weights_that_are_exchanged_are_recorded_anew(stand_in_graphs: list[tuple[int, ...]]) -> None:
    module, calls = _build()
    calls(torch.ones(1, 3))
    kept = module.weight  # so that the new one cannot lie in its place
    module.load_state_dict({"weight": torch.full((1,), 7.0)}, assign=True)
    assert calls(torch.ones(1, 3)).doubled[0, 0] == 7
    assert len(stand_in_graphs) == 2
    assert kept[0] == 2


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(work: Callable[[], _Seen], pictures: Tensor) -> tuple[Callable[[], None], _Seen]:
        output = work()

        def replay() -> None:
            again = work()
            time.sleep(1e-4)  # another thread's chance
            output.doubled.copy_(again.doubled)

        return replay, output

    monkeypatch.setattr("sparse_vlm.graphed_calls._capture", capture)
    monkeypatch.setattr(GraphedCalls, "_check_devices", lambda calls: None)
    _, calls = _build()
    calls(torch.ones(1, 3))

    def ask(value: float) -> bool:
        pictures = torch.full((1, 3), value)
        return all(torch.equal(calls(pictures).doubled, 2 * pictures) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda calls: pickle.loads(pickle.dumps(calls))])
def test_a_copy_records_for_itself(
    copier: Callable[[GraphedCalls[_Seen]], GraphedCalls[_Seen]], stand_in_graphs: list[tuple[int, ...]]
) -> None:
    module, calls = _build()
    calls(torch.ones(1, 3))
    other = copier(calls)
    with torch.no_grad():
        module.weight.fill_(5.0)
    assert other(torch.ones(1, 3)).doubled[0, 0] == 2
    assert len(stand_in_graphs) == 2


@no_gpu
def test_without_a_gpu_they_are_refused() -> None:
    with pytest.raises(ValueError, match="need the encoder on a CUDA device"):
        GraphedEncoder(build_encoder("sparseformer_btsp_augreg_base"))
    with pytest.raises(ValueError, match=r"all weights on one CUDA device, they are on cpu"):
        _build()[1](torch.ones(1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [None, pytest.param("default", marks=pytest.mark.slow)])
def test_graphed_encoder_equals_the_plain_one(compile: str | None) -> None:
    encoder = build_encoder("sparseformer_btsp_augreg_base").eval().cuda()
    graphed = GraphedEncoder(encoder, keep=1, compile=compile)
    near = 1e-5 if compile is None else 1e-4
    # Compiling a shape takes most of a minute.
    for batch, tokens in ((1, None), (2, 17), (1, None)) if compile is None else ((2, None),):
        for _ in range(2):
            pictures = torch.randn(batch, 3, 224, 224, device="cuda")
            with torch.inference_mode():
                plain = encoder(pictures, tokens)
            output = graphed(pictures, tokens)
            torch.testing.assert_close(output.tokens, plain.tokens, atol=near, rtol=near)
            torch.testing.assert_close(output.rois, plain.rois, atol=near, rtol=near)
    assert len(graphed.calls._recordings) == 1


@pytest.mark.gpu
def test_autocast_has_graphs_of_its_own() -> None:
    encoder = build_encoder("sparseformer_btsp_augreg_base").eval().cuda()
    graphed = GraphedEncoder(encoder)
    pictures = torch.randn(2, 3, 224, 224, device="cuda")
    for enabled in (True, False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled), torch.inference_mode():
            plain, output = encoder(pictures), graphed(pictures)
        share = (output.pooled - plain.pooled).abs().max() / plain.pooled.abs().max()
        assert share < (2e-2 if enabled else 1e-5)
    assert len(graphed.calls._recordings) == 2


@pytest.mark.gpu
def test_graphs_follow_a_cast() -> None:
    encoder = build_encoder("sparseformer_btsp_augreg_base").eval().cuda()
    graphed = GraphedEncoder(encoder)
    pictures = torch.randn(1, 3, 224, 224, device="cuda")
    assert graphed(pictures).tokens.dtype == torch.float32
    encoder.bfloat16()
    output, plain = graphed(pictures), encoder(pictures)
    assert output.tokens.dtype == torch.bfloat16
    torch.testing.assert_close(output.pooled, plain.pooled, atol=2e-2, rtol=2e-2)
