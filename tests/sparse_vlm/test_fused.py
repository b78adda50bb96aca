"""The fused look against the plain one: in Triton's interpreter, through its compiler, and on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_vlm import agreement, build_encoder, fused
from tests.sparse_vlm.kernels import needs_operators, needs_triton, run_python

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
INTERPRETED = """
import torch
from sparse_vlm.fused import Sight, build_problem, look_fused, look_plain
torch.set_num_threads(1)
worst = {}
with torch.no_grad():
    # Triton's interpreter cannot multiply bf16.
    for dtype in (torch.float32, torch.float16):
        for padding in ("border", "zeros"):
            for bias in (False, True):
                problem = list(build_problem("cpu", dtype, (16, 32, 16), bias))
                problem[1][0, 0, 0, 0], problem[1][0, 0, 1, 1] = float("nan"), float("inf")
                # Matrices as the generator leaves them: two slices of one tensor.
                both = torch.cat((problem[2].flatten(-2), problem[3].flatten(-2)), dim=-1)
                first, second = both.split((32 * 32, 16 * 16), dim=-1)
                problem[2], problem[3] = first.unflatten(-1, (32, 32)), second.unflatten(-1, (16, 16))
                if bias:  # of any stride
                    problem[4:] = [torch.stack((one, 1 - one), dim=-1)[:, 0] for one in problem[4:]]
                sight = Sight(*problem)
                fused, plain = look_fused(sight, padding).float(), look_plain(sight, padding).float()
                assert fused.shape == plain.shape == (2, 3, 16 * 32)
                difference = float((fused - plain).abs().max() / plain.abs().max())
                near = 1e-5 if dtype == torch.float32 else 2e-3
                assert difference < near, (dtype, padding, bias, difference)
print("equal")
"""

INSIDE_A_COMPILER = """
import torch
from sparse_vlm import agreement, build_encoder, fused
torch.set_num_threads(1)
agreement.DEVICES = ("cpu",)
looks, fused_look, graphs = [], fused.look_fused, []
fused.look_fused = lambda sight, padding: looks.append(padding) or fused_look(sight, padding)

def backend(graph, inputs):
    graphs.append(sum("look" in str(node.target) for node in graph.graph.nodes))
    return graph

encoder = build_encoder("sparseformer_btsp_augreg_base").eval()
encoder.cortex.blocks = encoder.cortex.blocks[:1]
compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend=backend)
pictures = torch.randn(1, 3, 64, 64)
plain = encoder(pictures, 5)
assert not looks
with torch.no_grad():
    output = compiled(pictures, 5)
    assert looks == ["border"] * 6, looks  # the first one asks whether kernel and plain path agree
    exported = torch.export.export(encoder, (pictures,))
assert graphs == [5], graphs
assert not any("look" in str(node.target) for node in exported.graph.nodes)
torch.testing.assert_close(output.pooled, plain.pooled, atol=1e-5, rtol=1e-4)
compiled(pictures, 5).pooled.sum().backward()
assert graphs == [5, 0] and len(looks) == 6  # gradients go the plain way
problem = fused.build_problem("cpu", torch.float32, (16, 32, 16), True)
checks = ("test_schema", "test_faketensor")
torch.library.opcheck(fused._look_operator, (*problem, "zeros"), test_utils=checks)
print("equal")
"""

TF32 = """
import torch
from sparse_vlm import agreement, fused
agreement.DEVICES = ("cpu",)
sight = fused.build_problem("cpu", torch.float32, (16, 16, 16), False)
matmul = torch.backends.cuda.matmul
with torch.no_grad():
    wanted = fused.look_plain(sight)
    assert fused.is_exact(torch.float32) and not fused.is_exact(torch.bfloat16)
    torch.testing.assert_close(fused.look(sight), wanted)
    matmul.allow_tf32 = True
    assert not fused.is_exact(torch.float32)
    torch.testing.assert_close(fused.look(sight), wanted, rtol=1e-2, atol=1e-2)
    matmul.allow_tf32 = False
    assert fused.is_exact(torch.float32)
    for precision in ("tf32", "ieee"):
        matmul.fp32_precision = precision
        assert fused.is_exact(torch.float32) == (precision == "ieee")
        torch.testing.assert_close(fused.look(sight), wanted, rtol=1e-2, atol=1e-2)
assert len(fused._agrees.answers) == 2
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_vlm.fused_kernel import look_kernel
for kind, precision in (("fp32", "ieee"), ("bf16", "tf32")):
    for bias in (False, True):
        signature = {name: f"*{kind}" for name in ("cells", "by_channel", "by_point", "mixed")}
        signature |= {"points": "*fp32"}
        signature |= {n: "i32" for n in ("tokens", "height", "width", "channel_stride", "point_stride")}
        constants = {"P": 16, "C": 64, "Q": 32, "ZEROS": not bias, "BIAS": bias, "PRECISION": precision}
        for name in ("channel_bias", "point_bias"):
            if bias:
                signature[name] = f"*{kind}"
            else:
                constants[name] = None
        signature = {n: signature.get(n, "constexpr") for n in look_kernel.arg_names}
        source = ASTSource(look_kernel, signature, constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
print("compiled")
"""


@needs_triton
def test_interpreted_kernel_equals_plain() -> None:
    assert run_python(INTERPRETED, TRITON_INTERPRET="1") == "equal"


@needs_triton
@pytest.mark.skipif(TORCH < (2, 9), reason="torch has two ways since 2.9")
def test_either_way_to_ask_for_tf32() -> None:
    assert run_python(TF32, TRITON_INTERPRET="1") == "equal"


@needs_triton
@needs_operators
def test_a_compiler_takes_the_kernel_as_one_operator() -> None:
    assert run_python(INSIDE_A_COMPILER, TRITON_INTERPRET="1") == "equal"


@needs_triton
@pytest.mark.slow
def test_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    assert run_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


def test_kernel_is_left_out_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        assert not fused._fits(fused.build_problem("cpu", torch.float32, (16, 64, 32), False))
    monkeypatch.setattr(agreement, "DEVICES", ("cpu",))
    fits = fused.build_problem("cpu", torch.float32, (16, 64, 32), False)
    with torch.no_grad():
        assert fused._fits(fits)
        for sizes in ((36, 96, 36), (4, 64, 32), (16, 256, 32)):
            assert not fused._fits(fused.build_problem("cpu", torch.float32, sizes, False))
        assert not fused._fits(fused.build_problem("cpu", torch.float64, (16, 64, 32), False))
        transposed = fits._replace(by_channel=fits.by_channel.transpose(-1, -2))
        assert not fused._fits(transposed)
    assert not fused._fits(fits)  # gradients are wanted


def test_kernel_that_disagrees_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = (torch.device("cpu"), torch.float32, (16, 64, 32), False, True, "border")
    monkeypatch.setattr(agreement.importlib.util, "find_spec", lambda name: object())
    for answer, agrees in ((1.0, True), (1.001, False)):
        monkeypatch.setattr(fused, "look_fused", lambda *p, f=answer: f * fused.look_plain(*p))
        fused._agrees.answers.clear()
        if agrees:
            assert fused._agrees(*kind)
        else:
            with pytest.warns(UserWarning, match="differs by"):
                assert not fused._agrees(*kind)

    def broken(*arguments: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused, "look_fused", broken)
    fused._agrees.answers.clear()
    with pytest.warns(UserWarning, match="no compiler"):
        assert not fused._agrees(*kind)
    fused._agrees.answers.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_with_the_kernel_equals_the_one_without(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder("sparseformer_btsp_augreg_base").eval().to("cuda", dtype)
    pictures = torch.randn(2, 3, 224, 224, device="cuda", dtype=dtype)
    with torch.inference_mode():
        with_kernel = encoder(pictures).pooled.float()
        assert len(fused._agrees.answers) > 0
        monkeypatch.setattr(fused, "_fits", lambda sight: False)
        without = encoder(pictures).pooled.float()
    share = (with_kernel - without).abs().max() / without.abs().max()
    assert share < (1e-5 if dtype == torch.float32 else 2e-2)
