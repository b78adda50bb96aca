"""RoI arithmetic as kernels against PyTorch's words: interpreted, compiled, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_vlm import roi_steps, rois
from sparse_vlm.roi_steps import adjust_rois, encode_rois, place_points
from tests.sparse_vlm.kernels import needs_triton, run_python

INTERPRETED = """
import torch
from sparse_vlm import agreement, roi_kernel, rois
from sparse_vlm.roi_steps import adjust_rois, encode_rois, place_points
torch.set_num_threads(1)
agreement.DEVICES = ("cpu",)
launches = []
for name in ("launch_place", "launch_adjust", "launch_encode"):
    def count(*given, plain=getattr(roi_kernel, name), name=name):
        launches.append(name)
        return plain(*given)
    setattr(roi_kernel, name, count)
torch.manual_seed(0)
for batch, tokens in ((3, 7), (2, 150)):  # less than a program's share, and more
    boxes = torch.randn(batch, tokens, 4)
    boxes[0, :2] = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.75, 0.5, 0.25, 0.5]])
    for dtype, near in ((torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        with torch.no_grad():
            for points in (16, 9):
                offsets = 5 * torch.randn(batch, tokens, points, 2).to(dtype) + 2
                bias = torch.randn(2, points).T.to(dtype)  # no contiguous one
                wanted = rois.place_points(boxes, bias.float() + offsets.float())
                torch.testing.assert_close(place_points(boxes, offsets, bias), wanted, atol=2e-6, rtol=1e-5)
            deltas = torch.randn(batch, tokens, 4).to(dtype)
            torch.testing.assert_close(
                adjust_rois(boxes, deltas), rois.adjust_rois(boxes, deltas), atol=2e-6, rtol=1e-5
            )
            for width, temperature in ((64, 10000.0), (256, 128.0)):
                code = encode_rois(boxes, width, temperature, dtype)
                assert code.dtype == dtype
                wanted = rois.encode_rois(boxes, width, temperature).to(dtype)
                torch.testing.assert_close(code, wanted, atol=near, rtol=near)
assert set(launches) == {"launch_place", "launch_adjust", "launch_encode"}
with torch.no_grad():
    assert place_points(boxes[:0], offsets[:0], bias).shape == (0, 150, 9, 2)
    assert adjust_rois(boxes[:0], deltas[:0]).shape == (0, 150, 4)
    assert encode_rois(boxes[:0], 64, 128.0, torch.float32).shape == (0, 150, 64)
    # Twice the precision, and torch.func, go the plain way.
    before = len(launches)
    assert place_points(boxes.double(), offsets.double(), bias.double()).dtype == torch.float64
    assert adjust_rois(boxes.double(), deltas.double()).dtype == torch.float64
    encode_rois(boxes.double(), 64, 128.0, torch.float32)
    together = torch.vmap(lambda one, by: adjust_rois(one[None], by[None])[0])(boxes, deltas)
    torch.testing.assert_close(together, rois.adjust_rois(boxes, deltas))
    assert len(launches) == before
deltas = deltas.float().requires_grad_()
(slope,) = torch.autograd.grad(adjust_rois(boxes, deltas).sum(), deltas)
assert slope.abs().sum() > 0 and len(launches) == before
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_vlm.roi_kernel import adjust_kernel, encode_kernel, place_kernel
for kind in ("fp32", "bf16"):
    for kernel, constants, halves in (
        (place_kernel, {"TOKENS": 16, "P": 16}, {"offsets", "bias"}),
        (adjust_kernel, {"BLOCK": 256}, {"deltas"}),
        (encode_kernel, {"BLOCK": 256}, {"code"}),
    ):
        full = {"rois", "points", "adjusted", "frequencies"}
        signature = {
            name: "constexpr" if name in constants else f"*{kind}" if name in halves
            else "*fp32" if name in full else "fp32" if name == "eps" else "i32"
            for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


@needs_triton
def test_interpreted_roi_arithmetic_equals_the_plain_one() -> None:
    assert run_python(INTERPRETED, TRITON_INTERPRET="1") == "equal"


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    assert run_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_plain_words_on_a_gpu(dtype: torch.dtype) -> None:
    near = 1e-5 if dtype == torch.float32 else 1e-2
    boxes = torch.rand(5, 63, 4, device="cuda")
    offsets, deltas = torch.randn(5, 63, 36, 2).to("cuda", dtype), torch.randn(5, 63, 4).to("cuda", dtype)
    bias = nn.Parameter(torch.randn(36, 2, device="cuda"))
    with torch.no_grad():
        pairs = [
            (place_points(boxes, offsets, bias), rois.place_points(boxes, bias + offsets.float())),
            (adjust_rois(boxes, deltas), rois.adjust_rois(boxes, deltas)),
            (encode_rois(boxes, 1024, 10000.0, dtype), rois.encode_rois(boxes, 1024, 10000.0).to(dtype)),
        ]
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, atol=near, rtol=near)
    for asked in (roi_steps._place_agrees, roi_steps._adjust_agrees, roi_steps._encode_agrees):
        assert any(asked.answers.values())
