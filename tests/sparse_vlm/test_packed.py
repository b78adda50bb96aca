"""Packed linear layers against plain ones, and that they never answer with old weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparse_vlm import SparseFormer
from sparse_vlm.packed import PackedLinear, can_pack, pack_linears

pytestmark = pytest.mark.skipif(not can_pack(), reason="this PyTorch has no oneDNN")


def _layers(encoder: SparseFormer) -> list[PackedLinear]:
    return [module for module in encoder.modules() if isinstance(module, PackedLinear)]


def test_packed_encoder_equals_plain(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(family)
    with torch.inference_mode():
        plain = encoder(pictures)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert pack_linears(encoder) == len(_layers(encoder)) > 5
    with torch.inference_mode():
        packed = encoder(pictures)
    assert any(layer._packed is not None for layer in _layers(encoder))
    for ours, theirs in ((packed.tokens, plain.tokens), (packed.pooled, plain.pooled)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.rois, plain.rois, atol=1e-5, rtol=1e-5)
    assert encoder.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert pack_linears(encoder) == len(_layers(encoder))  # again, and nothing else


def test_gradients_are_the_plain_ones(build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    plain = build_tiny()
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    for encoder in (plain, packed):
        encoder(pictures).tokens.square().sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    "change", ["in place", "data", "numpy", "new tensor", "load_state_dict", "there and back"]
)
def test_changed_weights_are_packed_anew(change: str) -> None:
    module = nn.Sequential(nn.Linear(8, 16))
    pack_linears(module)
    rows = torch.randn(5, 8)
    with torch.no_grad():
        before = module(rows)
        if change == "in place":
            module[0].weight.mul_(2)
        elif change == "data":
            module[0].weight.data.mul_(2)
        elif change == "numpy":
            module[0].weight.detach().numpy()[:] *= 2
        elif change == "new tensor":
            old = module[0].weight  # alive or not, it is another one
            module[0].weight = nn.Parameter(old * 2)
        elif change == "there and back":
            module.half()[0].weight.mul_(2)
            module.float()
        else:
            module.load_state_dict({"0.weight": module[0].weight * 2, "0.bias": module[0].bias.clone()})
        after = module(rows)
    bias = module[0].bias.detach()
    near = 1e-2 if change == "there and back" else 1e-5
    torch.testing.assert_close(after - bias, 2 * (before - bias), atol=near, rtol=near)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor packs no bf16")
def test_packed_bf16_encoder_equals_plain(build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    encoder = build_tiny().bfloat16()
    with torch.inference_mode():
        plain = encoder(pictures.bfloat16())
    pack_linears(encoder)
    with torch.inference_mode():
        packed = encoder(pictures.bfloat16())
    packs = [layer._packed.dtype for layer in _layers(encoder) if layer._packed is not None]
    assert packs
    assert set(packs) == {torch.bfloat16}
    torch.testing.assert_close(packed.tokens, plain.tokens, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(packed.pooled, plain.pooled, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["fp64", "autocast", "empty", "many rows"])
def test_where_packing_does_not_apply_the_plain_layer_answers(kind: str) -> None:
    module = nn.Sequential(nn.Linear(8, 16))
    pack_linears(module)
    rows = torch.randn({"empty": 0, "many rows": 1000}.get(kind, 5), 8)
    dtype = torch.float64 if kind == "fp64" else torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        answer = module.to(dtype)(rows.to(dtype))
        wanted = nn.functional.linear(rows.to(dtype), module[0].weight, module[0].bias)
    assert module[0]._packed is None
    assert torch.equal(answer, wanted)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_make_their_own(copier: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Sequential(nn.Linear(8, 16))
    pack_linears(module)
    rows = torch.randn(5, 8)
    with torch.no_grad():
        before = module(rows)
        twin = copier(module)
        assert torch.equal(twin(rows), before)
        twin[0].weight.zero_()
        assert torch.equal(module(rows), before)


def test_hooks_stay() -> None:
    module, seen = nn.Sequential(nn.Linear(8, 16)), []
    handle = module[0].register_forward_hook(lambda *_: seen.append(1))
    pack_linears(module)
    with torch.no_grad():
        module(torch.ones(5, 8))
        handle.remove()
        module(torch.ones(5, 8))
    assert seen == [1]


def test_layers_that_make_their_weight_at_every_call_are_left_alone() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4, bias=False))
    prune.l1_unstructured(module[0], "weight", 0.5)
    rows = torch.randn(5, 8)
    with torch.no_grad():
        wanted = module(rows)
        assert pack_linears(module) == 1
        torch.testing.assert_close(module(rows), wanted, atol=1e-5, rtol=1e-5)
        prune.remove(module[0], "weight")
        assert pack_linears(module) == 2
        torch.testing.assert_close(module(rows), wanted, atol=1e-5, rtol=1e-5)


def test_weights_made_in_inference_mode_are_left_alone() -> None:
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(8, 16))
    assert pack_linears(module) == 0
    assert type(module[0]) is nn.Linear
