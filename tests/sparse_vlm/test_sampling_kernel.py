"""The sampling kernels against the plain read-out: in Triton's interpreter, compiled, and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_vlm import agreement, build_encoder, sampling_operator, sampling_plain
from tests.sparse_vlm.kernels import needs_operators, needs_triton, run_python

INTERPRETED = """
import torch
from torch import inf, nan
from sparse_vlm import agreement, sampling_operator
from sparse_vlm.sampling import sample_features
from sparse_vlm.sampling_plain import sample_plain
agreement.DEVICES = ("cpu",)
near = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
torch.manual_seed(0)
for dtype, limit in near.items():
    for padding in ("border", "zeros"):
        for channels, height, width, count in ((64, 5, 7, 16), (96, 1, 6, 36), (3, 4, 1, 5)):
            feature_map = torch.randn(2, channels, height, width).to(dtype)
            points = torch.rand(2, 3, count, 2) * 1.6 - 0.3
            points[0, 0, 0, 0], points[0, 0, 1, 1], points[1, 0, 2, 0] = nan, inf, -inf
            points[1, 1, 0], points[1, 1, 1], points[0, 1, 0] = 0.0, 1.0, 1e6
            points[0, 2, 0] = torch.tensor([0.5 / width, 0.5 / height])  # the very centre of a cell
            wanted = torch.randn(2, 3, count, channels).to(dtype)
            found = []
            for read in (sample_features, sample_plain):
                inputs = feature_map.clone().requires_grad_(), points.clone().requires_grad_()
                samples = read(*inputs, padding)
                assert samples.dtype == dtype
                found.append([samples.detach(), *torch.autograd.grad(samples, inputs, wanted)])
            for ours, plain in zip(*found, strict=True):
                assert ours.shape == plain.shape
                assert ours.dtype == plain.dtype
                difference = float((ours.float() - plain.float()).abs().max() / plain.abs().max())
                assert difference < limit, (dtype, padding, channels, difference)
assert len(sampling_operator._agrees.answers) == 18
print("equal")
"""

INSIDE = """
import torch
from sparse_vlm import SparseFormerConfig, agreement, build_encoder, sampling_kernel, sampling_operator
from sparse_vlm.sampling import sample_features
from sparse_vlm.sampling_plain import sample_plain
small = SparseFormerConfig(
    width=48, depth=1, heads=4, mlp_width=64, focusing_width=32, focusing_heads=2, focusing_mlp_width=32,
    stem_channels=12, num_points=9, mixing_points=6, generator_width=8, num_latents=5,
)
torch.manual_seed(0)
encoder = build_encoder(small)
for parameter in encoder.parameters():
    if not parameter.any():
        torch.nn.init.normal_(parameter, std=0.02)
pictures = torch.randn(2, 3, 32, 40)
launched, launch = [], sampling_kernel.launch_gradients
sampling_kernel.launch_gradients = lambda *words: launched.append(1) or launch(*words)

def gradients(encoder, module=None):
    encoder.zero_grad()
    look = encoder if module is None else module
    look(pictures).pooled.square().sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}

def same(ours, plain):
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))

plain = gradients(encoder)
assert not launched
agreement.DEVICES = ("cpu",)
same(gradients(encoder), plain)
assert len(launched) == 6, launched  # the first asks whether kernels and plain path agree
encoder.set_grad_checkpointing()
same(gradients(encoder), plain)
encoder.set_grad_checkpointing(False)
same(gradients(encoder, torch.compile(encoder, fullgraph=True, backend="aot_eager")), plain)
assert len(launched) == 16, launched

def loss(state, picture):
    return torch.func.functional_call(encoder, state, (picture[None],)).pooled.square().sum()

state = {name: value.detach() for name, value in encoder.named_parameters()}
alone = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, pictures)
same({name: gradient.sum(0) for name, gradient in alone.items() if name in plain}, plain)
with torch.no_grad():
    exported = torch.export.export(encoder.eval(), (pictures,))
assert not any("sparse_vlm" in str(node.target) for node in exported.graph.nodes)
torch.use_deterministic_algorithms(True)
count = len(launched)
same(gradients(encoder), plain)
assert len(launched) == count
torch.use_deterministic_algorithms(False)
feature_map, points, _ = sampling_operator.build_problem("cpu", torch.float32, 16)

def second_order(read):
    inputs = feature_map.clone().requires_grad_(), points.clone().requires_grad_()
    first = torch.autograd.grad(read(*inputs).pow(3).sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(one.pow(2).sum() for one in first), inputs)

for ours, wanted in zip(second_order(sample_features), second_order(sample_plain), strict=True):
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
inputs = feature_map, points, "border"
torch.library.opcheck(sampling_operator._operator, inputs, test_utils=("test_schema", "test_faketensor"))
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_vlm.sampling_kernel import sample_kernel, scatter_kernel
for kernel in (sample_kernel, scatter_kernel):
    for kind in ("fp32", "bf16"):
        for zeros in (False, True):
            signature = {name: f"*{kind}" for name in ("cells", "samples", "gradient")}
            signature |= {name: "*fp32" for name in ("points", "by_cells", "by_points")}
            signature |= {n: "i32" for n in ("total", "per_picture", "height", "width", "channels")}
            signature = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
            source = ASTSource(kernel, signature, {"ROWS": 16, "C": 64, "ZEROS": zeros})
            assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


@needs_triton
@needs_operators
def test_interpreted_kernels_equal_plain() -> None:
    assert run_python(INTERPRETED, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == "equal"


@needs_triton
@needs_operators
def test_a_training_step_through_the_kernels_is_the_plain_one() -> None:
    assert run_python(INSIDE, TRITON_INTERPRET="1", OMP_NUM_THREADS="1") == "equal"


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    assert run_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


def test_gradients_by_hand_are_autograds() -> None:
    for padding in ("border", "zeros"):
        feature_map, points, wanted = sampling_operator.build_problem("cpu", torch.float32, 6)
        points[0, 0, 0, 0], points[0, 0, 1, 1] = float("nan"), float("inf")
        inputs = feature_map.requires_grad_(), points.requires_grad_()
        expected = torch.autograd.grad(sampling_plain.sample_plain(*inputs, padding), inputs, wanted)
        with torch.no_grad():
            found = sampling_plain.sample_gradients_plain(wanted, *inputs, padding)
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("fault", ["samples", "map", "points", "crash"])
def test_kernels_that_disagree_are_left_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("sparse_vlm.sampling_kernel", reason="needs Triton", exc_type=ImportError)
    kind = (torch.device("cpu"), torch.float32, 8, "border")
    scale = {"samples": 1.0, "map": 1.0, "points": 1.0}

    def samples(feature_map: torch.Tensor, points: torch.Tensor, zeros: bool) -> torch.Tensor:
        if fault == "crash" and scale["map"] != 1:
            raise RuntimeError("no compiler")
        return scale["samples"] * sampling_plain.sample_plain(feature_map, points)

    def gradients(*words: object) -> tuple[torch.Tensor, torch.Tensor]:
        by_map, by_points = sampling_plain.sample_gradients_plain(*words[:-1], "border")  # type: ignore[arg-type]
        return scale["map"] * by_map, scale["points"] * by_points

    monkeypatch.setattr(kernel, "launch_samples", samples)
    monkeypatch.setattr(kernel, "launch_gradients", gradients)
    sampling_operator._agrees.answers.clear()
    assert sampling_operator._agrees(*kind)
    scale["map" if fault == "crash" else fault] = 1.001
    sampling_operator._agrees.answers.clear()
    with pytest.warns(UserWarning, match="no compiler" if fault == "crash" else "differs by"):
        assert not sampling_operator._agrees(*kind)
    sampling_operator._agrees.answers.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_with_the_kernels_equal_those_without(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder("sparseformer_btsp_augreg_base").cuda()
    for parameter in encoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    pictures = torch.randn(2, 3, 224, 224, device="cuda")
    found = []
    for devices in (("cuda",), ()):
        monkeypatch.setattr(agreement, "DEVICES", devices)
        encoder.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, autocast):
            loss = encoder(pictures).pooled.float().square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert sampling_operator._agrees(torch.device("cuda", 0), torch.float32, 64, "border")
    for ours, plain in zip(*found, strict=True):
        share = float((ours - plain).norm() / plain.norm().clamp(min=1e-12))
        assert share < (0.1 if autocast else 1e-2)
