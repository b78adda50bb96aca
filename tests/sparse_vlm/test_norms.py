"""Sums, norms, pooling and QuickGELU as kernels against PyTorch's words: interpreted, compiled, on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_vlm import (
    SparseFormer,
    activations,
    agreement,
    build_encoder,
    fused,
    norms,
    sampling_operator,
    stem,
)
from sparse_vlm.activations import quick_gelu, quick_gelu_plain
from sparse_vlm.norms import add_norm, pool_norm, pool_norm_plain
from sparse_vlm.stem import convolve_cells, convolve_plain
from tests.sparse_vlm.kernels import needs_operators, needs_triton, run_python

INTERPRETED = """
import torch
from torch import nan, nn
from sparse_vlm import agreement, norm_kernel
from sparse_vlm.norms import add_norm, pool_norm, pool_norm_plain
torch.set_num_threads(1)
agreement.DEVICES = ("cpu",)
launches = []
for name in ("launch_add_norm", "launch_pool_norm"):
    def count(*given, plain=getattr(norm_kernel, name)):
        launches.append(given)
        return plain(*given)
    setattr(norm_kernel, name, count)

with torch.no_grad():
    for dtype, near in ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
        for width in (64, 72):
            norm = nn.LayerNorm(width, eps=1e-3).to(dtype)
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
            if width == 72:  # as slices of a larger table are
                for name in ("weight", "bias"):
                    setattr(norm, name, nn.Parameter(torch.randn(width, 2, dtype=dtype)[:, 0]))
            tokens, update = torch.randn(2, 2, 5, width, dtype=dtype)
            tokens += 3
            for given in (update, None):
                before = len(launches)
                added, normed = add_norm(tokens, given, norm)
                assert len(launches) > before
                wanted = tokens if given is None else tokens + given
                # The interpreter does not round to the nearest bf16.
                exact = 0 if dtype != torch.bfloat16 else near
                torch.testing.assert_close(added, wanted, atol=exact, rtol=exact)
                torch.testing.assert_close(normed, norm(wanted), atol=near, rtol=near)
        for channels, height, width in ((16, 9, 8), (12, 1, 5), (16, 12, 13)):
            features = torch.randn(2, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
            features[1, 3, 0, 2] = nan
            bias = torch.randn(channels, 2, dtype=dtype)[:, 0]
            for layout in (features, features.contiguous()):
                before = len(launches)
                got, wanted = pool_norm(layout, bias), pool_norm_plain(features, bias)
                assert len(launches) > before and wanted.isnan().any() and not wanted.isnan().all()
                torch.testing.assert_close(got, wanted, atol=near, rtol=near, equal_nan=True)
    assert pool_norm(features[:0], bias).shape == (0, 16, 6, 7)
    before = len(launches)
    assert add_norm(tokens[:0], update[:0], norm)[1].shape == (0, 5, width := tokens.shape[-1])
    # Where a kernel would leave something out it is not asked.
    before = len(launches)
    hooked, seen = nn.LayerNorm(width).to(dtype), []
    hooked.register_forward_hook(lambda *given: seen.append(given))
    add_norm(tokens, update, hooked)
    assert seen
    for other in (nn.LayerNorm(width, bias=False).to(dtype), nn.Identity()):
        add_norm(tokens, None, other)
    add_norm(tokens.double(), None, nn.LayerNorm(width).double())
    add_norm(tokens.transpose(0, 1), None, norm)
    several = torch.stack((norm.weight, norm.bias))

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm
        def forward(self, given):
            return add_norm(given, None, self.norm)[1]
    with_weights = lambda one: torch.func.functional_call(Normed(), {"norm.weight": one}, (tokens[:1],))
    got = torch.vmap(with_weights)(several)[0]
    torch.testing.assert_close(got, norm(tokens[:1]), atol=near, rtol=near)
    biases = torch.stack((bias, bias + 1))
    torch.testing.assert_close(
        torch.vmap(lambda one: pool_norm(features, one))(biases)[1], pool_norm_plain(features, bias + 1),
        atol=near, rtol=near, equal_nan=True,
    )
    assert len(launches) == before, launches[before:]
    # Weights of any stride.
    norm.weight, norm.bias = (nn.Parameter(t) for t in torch.randn(width, 2, dtype=dtype).unbind(1))
    torch.testing.assert_close(add_norm(tokens, None, norm)[1], norm(tokens), atol=near, rtol=near)
    wanted = pool_norm_plain(features, strided := torch.randn(16, 2, dtype=dtype)[:, 0])
    torch.testing.assert_close(pool_norm(features, strided), wanted, atol=near, rtol=near, equal_nan=True)
    assert len(launches) == before + 2
before = len(launches)
add_norm(tokens.float().requires_grad_(), None, norm.float())
pool_norm(features.float(), bias.float())
assert len(launches) == before
print("equal")
"""

ACTIVATED = """
import torch
from sparse_vlm import activation_kernel, activations, agreement
from sparse_vlm.activations import quick_gelu, quick_gelu_plain
torch.set_num_threads(1)
agreement.DEVICES = ("cpu",)
launches = []
for name in ("launch_quick_gelu", "launch_quick_gelu_gradient"):
    def count(*given, plain=getattr(activation_kernel, name), name=name):
        launches.append(name)
        return plain(*given)
    setattr(activation_kernel, name, count)
for dtype, near in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
    x = torch.cat((10 * torch.randn(4999), torch.tensor([-60000.0, 60000.0, 0.0]))).to(dtype).view(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(quick_gelu(x), quick_gelu_plain(x.float()).to(dtype), atol=near, rtol=near)
        assert quick_gelu(x[:0]).shape == (0, 2501)
    (x := x.requires_grad_()).grad = None
    arriving = torch.randn_like(x)
    quick_gelu(x).backward(arriving)
    exact = x.detach().double().requires_grad_()
    (exact * torch.sigmoid(1.702 * exact)).backward(arriving.double())
    torch.testing.assert_close(x.grad, exact.grad.to(dtype), atol=4 * near, rtol=4 * near)
assert set(launches) == {"launch_quick_gelu", "launch_quick_gelu_gradient"}
x = torch.randn(5, requires_grad=True)
kept = quick_gelu(x).grad_fn.saved_tensors if hasattr(quick_gelu(x).grad_fn, "saved_tensors") else [x]
assert len(kept) == 1
# Gradients of gradients, torch.func, strided inputs and compilers go the plain way.
double = torch.randn(6, dtype=torch.float64)
(slope,) = torch.autograd.grad(quick_gelu(x).sum(), x, create_graph=True)
(curve,) = torch.autograd.grad(slope.sum(), x)
(wanted,) = torch.autograd.grad(torch.func.grad(lambda v: quick_gelu_plain(v).sum())(x).sum(), x)
torch.testing.assert_close(curve, wanted, atol=1e-5, rtol=1e-5)
del launches[:]
torch.testing.assert_close(torch.vmap(quick_gelu)(x.detach()), quick_gelu_plain(x.detach()))
torch.testing.assert_close(quick_gelu(torch.ones(3, 4).T), quick_gelu_plain(torch.ones(4, 3)))
torch.compile(quick_gelu, fullgraph=True, backend="eager")(x).sum().backward()
assert not launches
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_vlm.activation_kernel import quick_gelu_gradient_kernel, quick_gelu_kernel
from sparse_vlm.norm_kernel import add_norm_kernel, pool_norm_kernel
tensors = {"values", "result", "gradient", "tokens", "update"}
tensors |= {"weight", "bias", "added", "normed", "features"}
for kind in ("fp32", "bf16"):
    for kernel, constants in (
        (quick_gelu_kernel, {"BLOCK": 2048}),
        (quick_gelu_gradient_kernel, {"BLOCK": 2048}),
        (add_norm_kernel, {"WIDTH": 1024, "ADD": True}),
        (add_norm_kernel, {"WIDTH": 1024, "ADD": False}),
        (pool_norm_kernel, {"CELLS": 32, "C": 64}),
    ):
        signature = {
            name: "constexpr" if name in constants else f"*{kind}" if name in tensors
            else "fp32" if name == "eps" else "i32"
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


@needs_triton
def test_interpreted_norms_equal_plain_ones() -> None:
    assert run_python(INTERPRETED, TRITON_INTERPRET="1") == "equal"


@needs_triton
@needs_operators
def test_interpreted_activation_equals_the_plain_one() -> None:
    assert run_python(ACTIVATED, TRITON_INTERPRET="1") == "equal"


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    assert run_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


@pytest.mark.parametrize("size", [(64, 64), (31, 34), (5, 7), (50, 33)])
def test_convolution_over_cells_is_the_convolution(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    results = [convolve(images, weight) for convolve in (convolve_plain, convolve_cells)]
    assert torch.equal(torch.tensor(results[0].shape), torch.tensor(results[1].shape))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0], F.conv2d(images, weight, stride=2, padding=3))
    arriving = torch.randn_like(results[0])
    ours, theirs = (torch.autograd.grad(result, (images, weight), arriving) for result in results)
    torch.testing.assert_close(ours, theirs)


def test_pooling_before_bias_and_relu_changes_nothing() -> None:
    features, bias = torch.randn(2, 8, 9, 11), torch.randn(8)
    wanted = F.max_pool2d(F.relu(features + bias.view(-1, 1, 1)), 3, 2, 1).permute(0, 2, 3, 1)
    wanted = F.layer_norm(wanted, (8,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(pool_norm(features, bias), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_plain_words_on_a_gpu(dtype: torch.dtype) -> None:
    near = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    norm = nn.LayerNorm(768).to("cuda", dtype)
    tokens, update = torch.randn(2, 3, 50, 768, device="cuda").to(dtype)
    features, bias = torch.randn(3, 64, 112, 111, device="cuda").to(dtype), torch.randn(64).to("cuda", dtype)
    with torch.no_grad():
        added, normed = add_norm(tokens, update, norm)
        torch.testing.assert_close(normed, norm(tokens + update), atol=near, rtol=near)
        assert torch.equal(added, tokens + update)
        torch.testing.assert_close(
            pool_norm(features, bias), pool_norm_plain(features, bias), atol=near, rtol=near
        )
    x = tokens.requires_grad_()
    gradients = [torch.autograd.grad(act(x), x, update)[0] for act in (quick_gelu, quick_gelu_plain)]
    torch.testing.assert_close(*gradients, atol=near, rtol=near)
    for asked in (norms._add_agrees, norms._pool_agrees, activations._agrees):
        assert len(asked.answers) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_with_all_kernels_equals_the_one_without(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: SparseFormer = build_encoder("sparseformer_btsp_openai_clip_base").eval().to("cuda", dtype)
    pictures = torch.randn(2, 3, 225, 224, device="cuda", dtype=dtype)
    outputs: list[torch.Tensor] = []
    for devices in (("cuda",), ()):
        monkeypatch.setattr(agreement, "DEVICES", devices)
        with torch.inference_mode():
            outputs.append(encoder(pictures).pooled.float())
    share = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
    assert share < (1e-5 if dtype == torch.float32 else 3e-2)


def test_problems_are_drawn_on_the_cpu_whatever_the_default_device() -> None:
    def draw() -> list[torch.Tensor]:
        sight = fused.build_problem("cpu", torch.float32, (16, 32, 16), True)
        problem = sampling_operator.build_problem("cpu", torch.float32, 16)
        drawn = agreement.build_drawer("cpu", torch.float32)(3, 4)
        return [*(value for value in sight if isinstance(value, torch.Tensor)), *problem, drawn]

    wanted = draw()
    with torch.device("meta"):  # its generators are none of the CPU's, as a GPU's are not
        drawn = draw()
    assert all(torch.equal(own, other) for own, other in zip(drawn, wanted, strict=True))


def test_the_problem_of_quick_gelu_is_drawn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "agree", lambda name, kernel, plain, tolerance: bool(plain()))
    with torch.device("meta"):
        assert activations._agrees.question(torch.device("cpu"), torch.float32)


def test_cells_are_for_half_precision_on_a_gpu_and_for_no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    images: Any = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)
    assert stem._has_tensor_cores(images)
    assert not stem._has_tensor_cores(SimpleNamespace(dtype=torch.float32, is_cuda=True))  # type: ignore[arg-type]
    monkeypatch.setattr(stem, "is_exporting", lambda: True)
    assert not stem._has_tensor_cores(images)


def test_a_seed_draws_the_stem_that_a_convolution_would_have() -> None:
    torch.manual_seed(3)
    own = stem.EarlyConvolution(8)
    torch.manual_seed(3)
    convolution = nn.Conv2d(3, 8, kernel_size=7, stride=2, padding=3)
    assert not any(isinstance(module, nn.Conv2d) for module in own.modules())
    assert torch.equal(own.conv.weight, convolution.weight)
    assert convolution.bias is not None
    assert torch.equal(own.conv.bias, convolution.bias)


@needs_triton
def test_pictures_lie_along_the_axis_of_a_launch_that_takes_any_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparse_vlm import norm_kernel

    grids: list[tuple[int, ...]] = []

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *given, **constants: None

    monkeypatch.setattr(norm_kernel, "pool_norm_kernel", Watched())
    norm_kernel.launch_pool_norm(torch.zeros(70, 16, 9, 8), torch.zeros(16), 1e-5)
    assert grids == [(70,)]  # CUDA takes 65,535 along the others
