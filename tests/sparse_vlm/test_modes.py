"""The encoder under other precisions, compilers and ways of being built."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_vlm import SparseFormer, build_encoder

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).min().item()


def test_autocast_bf16(family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    encoder = build_tiny(family)
    exact = encoder(pictures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = encoder(pictures)
    assert all(rois.dtype == torch.float32 for rois in output.rois)
    assert (output.rois[-1] - exact.rois[-1]).abs().max() < 0.02
    assert _cosine(output.pooled, exact.pooled) > 0.99
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = encoder.train()(pictures).pooled.float().square().sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_pure_bf16_keeps_rois_in_fp32(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(family)
    exact = encoder(pictures)
    focus = encoder.bfloat16().focus(pictures.bfloat16())
    output = encoder(pictures.bfloat16())
    assert output.tokens.dtype == output.pooled.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in (*focus.rois, *focus.points))
    assert (output.rois[-1] - exact.rois[-1]).abs().max() < 0.02
    assert _cosine(output.pooled, exact.pooled) > 0.98
    # RoIs after a move lie between the values that bf16 can hold.
    moved = output.rois[-1]
    assert not torch.equal(moved, moved.bfloat16().float())


def test_fp32_pictures_may_meet_a_bf16_encoder(
    build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny().bfloat16()
    assert torch.equal(encoder(pictures).pooled, encoder(pictures.bfloat16()).pooled)


def test_fp64_is_fp64_throughout(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(family)
    single = encoder(pictures)
    output = encoder.double()(pictures.double())
    assert output.pooled.dtype == output.rois[-1].dtype == torch.float64
    torch.testing.assert_close(output.pooled.float(), single.pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("bootstrapped", "eager"),
        ("v1", "eager"),
        # On two CPU cores inductor compiles for minutes; where people use it there is a GPU.
        pytest.param(
            "bootstrapped",
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_compiles_without_a_graph_break(
    name: str, backend: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    if name == "v1" and TORCH < (2, 2):
        pytest.skip("torch 2.1's compiler breaks on a function of its own with setup_context")
    device = "cuda" if backend == "inductor" else "cpu"
    encoder, pictures = build_tiny(name).to(device), pictures.to(device)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    output, exact = compiled(pictures), encoder(pictures)
    torch.testing.assert_close(output.tokens, exact.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.rois[-1], exact.rois[-1], atol=1e-5, rtol=1e-5)


def test_compiled_training_step(build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    gradients = []
    torch._dynamo.reset()
    for wrap in (lambda module: module, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
        encoder = build_tiny().train()
        wrap(encoder)(pictures).pooled.square().sum().backward()
        gradients.append(encoder.focusing.stage.offset_bias.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(TORCH < (2, 5), reason="torch.export with dynamic shapes settled in torch 2.5")
@pytest.mark.parametrize("name", ["bootstrapped", "v1", "siglip"])
def test_exports_with_a_dynamic_batch(
    name: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (pictures[:2],), dynamic_shapes=({0: batch},))
    for count in (1, 3):
        output = program.module()(pictures[:count])
        torch.testing.assert_close(output.pooled, encoder(pictures[:count]).pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(TORCH < (2, 5), reason="PyTorch cannot save a program that returns a named tuple")
def test_an_exported_program_is_saved_and_read(
    build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder, file = build_tiny(), io.BytesIO()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"images": {0: batch}, "num_tokens": None}
    program = torch.export.export(encoder, (pictures[:2],), {"num_tokens": 5}, dynamic_shapes=shapes)
    torch.export.save(program, file)
    file.seek(0)
    output, wanted = torch.export.load(file).module()(pictures, num_tokens=5), encoder(pictures, 5)
    assert type(output) is type(wanted)
    torch.testing.assert_close(output.tokens, wanted.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.rois, wanted.rois, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_runs_as_onnx_with_any_batch_and_size(
    build_tiny: Callable[..., SparseFormer], pictures: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="there is no onnxruntime to run the file with")
    encoder = build_tiny()
    shapes = {"images": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(
        encoder, (pictures[:2],), tmp_path / "encoder.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    for images in (pictures, pictures[:1, :, :37, :50].contiguous()):
        tokens, *_, pooled = (torch.from_numpy(value) for value in session.run(None, {name: images.numpy()}))
        wanted = encoder(images)
        torch.testing.assert_close(tokens, wanted.tokens, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled, wanted.pooled, atol=1e-4, rtol=1e-4)


def test_meta_device_then_to_empty(family: str, tiny_configs: dict, pictures: Tensor) -> None:
    with torch.device("meta"):
        encoder = build_encoder(tiny_configs[family])
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert not list(encoder.buffers())
    encoder.to_empty(device="cpu")
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(0)
    encoder.init_weights()
    direct = build_encoder(tiny_configs[family])
    torch.manual_seed(0)
    direct.init_weights()
    for name, value in direct.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(encoder.state_dict()[name], value), name
    assert encoder.eval()(pictures).pooled.isfinite().all()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_copies_are_whole_and_independent(
    copier: Callable[[SparseFormer], SparseFormer],
    family: str,
    build_tiny: Callable[..., SparseFormer],
    pictures: Tensor,
) -> None:
    encoder = build_tiny(family)
    before = encoder(pictures).pooled
    twin = copier(encoder)
    assert torch.equal(twin(pictures).pooled, before)
    assert twin.config == encoder.config
    assert twin.transform.config == encoder.transform.config
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(encoder(pictures).pooled, before)


@pytest.mark.parametrize("family", ["bootstrapped", "siglip", "v1"])
def test_weights_are_read_while_their_own_module_runs(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    # DeepSpeed's ZeRO-3 and accelerate bring a module's own weights for its call, and take them away again.
    encoder = build_tiny(family).eval()
    wanted = encoder(pictures)
    for module in encoder.modules():
        kept = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}

        def bring(module: torch.nn.Module, given: object, kept: dict[str, Tensor] = kept) -> None:
            for name, value in module.named_parameters(recurse=False):
                value.data = kept[name]

        def take(module: torch.nn.Module, given: object, result: object = None) -> None:
            for value in module.parameters(recurse=False):
                value.data = torch.empty(0, dtype=value.dtype)

        if kept:
            module.register_forward_pre_hook(bring)
            module.register_forward_hook(take)
            take(module, None)
    with torch.no_grad():
        output = encoder(pictures)
    assert torch.equal(output.pooled, wanted.pooled)
    assert torch.equal(output.tokens, wanted.tokens)
