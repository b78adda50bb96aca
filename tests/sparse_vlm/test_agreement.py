"""When kernels are asked whether they agree with the plain path, and which answers are remembered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparse_vlm import agreement
from sparse_vlm.activations import quick_gelu_gradient_plain
from sparse_vlm.agreement import AskedOnce, agree, has_kernels, may_infer


@pytest.fixture(autouse=True)
def _kernels_are_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "DEVICES", ("cpu",))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton were installed."""
    monkeypatch.setattr(agreement.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("triton")
def test_a_result_that_is_no_number_is_no_agreement() -> None:
    right, wrong = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert agree("x", lambda: (right, right), lambda: (right, right), 1e-5)
    for results in ((wrong, right), (right, wrong)):
        with pytest.warns(UserWarning, match="differs by"):
            assert not agree("x", lambda given=results: given, lambda: (right, right), 1e-5)


def test_answers_are_remembered() -> None:
    asked: list[int] = []
    question = AskedOnce(lambda width: bool(asked.append(width)) or width > 1)
    assert [question(1), question(2), question(1), question(2)] == [False, True, False, True]
    assert asked == [1, 2]


@pytest.mark.usefixtures("triton")
def test_no_memory_left_says_nothing_of_a_kernel() -> None:
    full = [True]

    def kernel() -> tuple[Tensor]:
        if full[0]:
            raise torch.cuda.OutOfMemoryError("full")
        return (torch.ones(2),)

    question = AskedOnce(lambda: agree("x", kernel, lambda: (torch.ones(2),), 1e-5))
    assert not question()
    full.clear()
    full.append(False)
    assert question()


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    question = AskedOnce(lambda: True)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert not question()
    capturing[0] = False
    assert question()


@pytest.mark.skipif(
    not hasattr(torch._C._functorch, "maybe_current_level"), reason="this torch does not say where vmap is"
)
def test_nothing_is_drawn_within_vmap() -> None:
    question = AskedOnce(lambda: bool(torch.randn(2).isfinite().all()))
    torch.vmap(lambda one: one + question())(torch.ones(3))
    assert not question.answers
    assert question()


def test_kernels_are_for_plain_tensors_only() -> None:
    plain = torch.ones(2)
    assert has_kernels(plain)
    assert has_kernels(nn.Parameter(plain))
    assert not has_kernels(torch.ones(2, device="meta"))
    seen: list[bool] = []

    def look(one: Tensor) -> Tensor:
        seen.append(has_kernels(one))
        return one * 2

    torch.vmap(look)(plain)
    torch.func.grad(lambda one: look(one).sum())(plain)
    torch.jit.trace(look, (plain,), check_trace=False)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(plain, plain))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        look(torch.ones(2))
    assert seen == [False] * 5
    assert not may_infer(plain)
    with torch.no_grad():
        assert may_infer(plain)


def test_the_gradient_of_quick_gelu_has_no_hole_at_fp16_s_ends() -> None:
    x = torch.tensor([50000.0, -50000.0, 1.0], dtype=torch.float16)
    slope = quick_gelu_gradient_plain(torch.ones_like(x), x)
    assert slope.dtype == torch.float16
    torch.testing.assert_close(slope.float(), torch.tensor([1.0, 0.0, 1.0677]), atol=2e-3, rtol=0)
