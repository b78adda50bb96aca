"""Linear layers by products of digits: held to fp64, and to plain layers wherever they do not apply."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sparse_vlm import SparseFormer, digits
from sparse_vlm.digits import (
    DigitLinear,
    DigitsError,
    DigitWeight,
    multiply_digits,
    pack_digits,
    split_weight,
    what_is_missing,
)
from sparse_vlm.packed import pack_linears
from sparse_vlm.transform import ImageTransform

needs_kernel = pytest.mark.skipif(
    digits.what_is_missing() is not None, reason=f"no digits here: {digits.what_is_missing()}"
)
_CACHES = (digits.what_is_missing, digits._load_kernel, digits._processor_features)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What is known of this machine is forgotten before and after the test."""
    for cache in _CACHES:
        cache.cache_clear()
    yield
    for cache in _CACHES:
        cache.cache_clear()


def _join(weight: DigitWeight, features: int) -> Tensor:
    """The numbers that the digits stand for, (out, in), fp64."""
    count = weight.tiles.shape[2]
    tiles = weight.tiles.permute(0, 4, 1, 3, 5, 2).double()  # (panels, 16, steps, 16, 4, digits)
    outputs = tiles.shape[0] * 16
    by_digit = tiles.reshape(outputs, -1, count)
    places = 256.0 ** -torch.arange(count, dtype=torch.float64)
    return (by_digit @ places)[: weight.scales.numel(), :features] * weight.scales.double().unsqueeze(1)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "bits"), [(1, 7), (2, 15), (3, 22.5)])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (33, 100), (5, 200)])
def test_digits_stand_for_the_weight(count: int, bits: float, shape: tuple[int, int]) -> None:
    weight = _draw(*shape) * torch.logspace(-9, 9, shape[0]).unsqueeze(1)
    split = split_weight(weight, count)
    assert split.tiles.dtype == torch.int8
    assert split.tiles.is_contiguous()
    joined = _join(split, shape[1])
    errors = (joined - weight).abs().amax(dim=1) / weight.abs().amax(dim=1)
    assert errors.max() <= 2.0**-bits


def test_weights_of_nothing_are_zero_and_what_is_no_number_stays_none() -> None:
    weight = _draw(4, 10)
    weight[0] = 0
    weight[1, 3] = torch.inf
    weight[2, 5] = torch.nan
    joined = _join(split_weight(weight, 3), 10)
    assert torch.equal(joined[0], torch.zeros(10, dtype=torch.float64))
    assert joined[1:3].isnan().all()
    torch.testing.assert_close(joined[3].float(), weight[3])


@needs_kernel
@pytest.mark.parametrize(("count", "tolerance"), [(1, 4e-2), (2, 3e-4), (3, 2e-6)])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (1, 768, 50), (16, 64, 16), (17, 65, 17), (49, 100, 33), (130, 3072, 20), (700, 300, 40)],
)
def test_products_are_those_of_fp64(count: int, tolerance: float, sizes: tuple[int, int, int]) -> None:
    rows, features, outputs = sizes
    left, right, bias = _draw(rows, features), _draw(outputs, features, seed=1), _draw(outputs, seed=2)
    wanted = left.double() @ right.double().T + bias
    product = multiply_digits(left, split_weight(right, count), bias)
    assert product.dtype == torch.float32
    assert (product - wanted).abs().max() <= tolerance * features**0.5 * 4


@needs_kernel
def test_three_digits_err_no_more_than_fp32() -> None:
    left, right = _draw(256, 1024), _draw(512, 1024, seed=1)
    wanted = left.double() @ right.double().T
    plain = (left @ right.T - wanted).square().mean().sqrt()
    ours = (multiply_digits(left, split_weight(right, 3)) - wanted).square().mean().sqrt()
    assert ours <= 1.5 * plain


@needs_kernel
def test_each_row_has_its_own_size() -> None:
    sizes = torch.logspace(-25, 25, 49).unsqueeze(1)
    left, right = _draw(49, 192), _draw(64, 192, seed=1)
    split = split_weight(right, 3)
    large, small = multiply_digits(left * sizes, split), multiply_digits(left, split)
    torch.testing.assert_close(large / sizes, small, atol=1e-4, rtol=1e-5)


@needs_kernel
def test_an_outlier_costs_what_it_costs_in_fp32() -> None:
    left, right = _draw(49, 768), _draw(64, 768, seed=1)
    left[:, 7] *= 1000
    wanted = left.double() @ right.double().T
    plain = (left @ right.T - wanted).abs().max()
    assert (multiply_digits(left, split_weight(right, 3)) - wanted).abs().max() <= 3 * plain


@needs_kernel
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_errors_stay_within_what_is_said_of_them(digits: int) -> None:
    """Worst for entries beside a larger one that the weight gives no say."""
    left, right = _draw(49, 768), _draw(64, 768, seed=1)
    left[:, 7], right[:, 7] = 1e5, 0
    wanted = left.double() @ right.double().T
    bound = 768 * left.abs().amax(1, keepdim=True) * right.abs().amax(1) * 2.0 ** (1 - 8 * digits)
    error = (multiply_digits(left, split_weight(right, digits)) - wanted).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-3  # not what fp32 gives: outliers do cost something


@needs_kernel
@pytest.mark.parametrize(
    ("rows", "bias", "message"),
    [
        (torch.ones(4, 128), None, r"rows must be \(R, 64\)"),
        (torch.ones(64), None, r"rows must be \(R, 64\)"),
        (torch.ones(4, 64).double(), None, r"torch\.float64"),
        (torch.ones(4, 64), torch.ones(7), r"the bias \(8,\)"),
        (torch.ones(4, 64), torch.ones(8).half(), "the bias must be torch.float32"),
    ],
)
def test_operands_that_do_not_fit_are_refused(rows: Any, bias: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiply_digits(rows, split_weight(torch.ones(8, 64), 3), bias)


@needs_kernel
def test_the_question_what_is_missing_does_not_depend_on_the_default_device() -> None:
    what_is_missing.cache_clear()
    with torch.device("meta"):
        assert what_is_missing() is None


@needs_kernel
def test_packed_layers_are_packed_anew_as_asked() -> None:
    linears = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert pack_linears(linears) == 2
    assert [pack_digits(linears, digits, strict=True) for digits in (3, 2)] == [2, 2]
    assert [layer.digits for layer in linears] == [2, 2]


@needs_kernel
def test_empty_rows_give_the_bias_and_bad_ones_spoil_only_themselves() -> None:
    left, right, bias = _draw(20, 70), _draw(18, 70, seed=1), _draw(18, seed=2)
    left[3] = 0
    left[4] = 1e-33 * left[5]
    split = split_weight(right, 3)
    assert not multiply_digits(left, split)[3:5].any()
    good = multiply_digits(left, split, bias)
    assert torch.equal(good[3], bias)
    assert torch.equal(good[4], bias)
    for row, value in ((0, torch.nan), (7, torch.inf), (19, -torch.inf)):
        left[row, 69] = value
    bad = multiply_digits(left, split, bias)
    spoilt = torch.tensor([row in (0, 7, 19) for row in range(20)])
    assert bad[spoilt].isnan().all()
    assert torch.equal(bad[~spoilt], good[~spoilt])


@needs_kernel
def test_threads_and_neighbours_change_no_bit() -> None:
    left, split = _draw(777, 3072), split_weight(_draw(50, 3072, seed=1), 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = multiply_digits(left, split)
        torch.set_num_threads(3)
        assert torch.equal(multiply_digits(left, split), one)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(multiply_digits(left[100:149], split), one[100:149])


@needs_kernel
def test_any_layout_and_default_precision() -> None:
    layer = nn.Sequential(nn.Linear(12, 20))
    rows = _draw(12, 3, 7).permute(2, 1, 0)  # (7, 3, 12), not contiguous
    wanted = layer(rows)
    assert pack_digits(layer) == 1
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.no_grad():
            answer = layer(rows)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(answer, wanted)
    assert layer[0]._packed is not None


@needs_kernel
def test_encoder_equals_plain(family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    encoder = build_tiny(family)
    with torch.inference_mode():
        plain = encoder(pictures)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    count = pack_digits(encoder)
    layers = [module for module in encoder.modules() if isinstance(module, DigitLinear)]
    assert count == len(layers) > 5
    with torch.inference_mode():
        ours = encoder(pictures)
    assert any(layer._packed is not None for layer in layers)
    for one, other in ((ours.tokens, plain.tokens), (ours.pooled, plain.pooled)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.rois, plain.rois, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert pack_digits(encoder) == count  # again, and nothing else
    encoder(pictures).tokens.sum().backward()  # with gradients the plain layers answer


@needs_kernel
@pytest.mark.parametrize("kind", ["fp64", "bf16", "autocast", "empty", "gradients"])
def test_where_digits_do_not_apply_the_plain_layer_answers(kind: str) -> None:
    module = nn.Sequential(nn.Linear(8, 16))
    pack_digits(module)
    rows = torch.randn(0 if kind == "empty" else 5, 8)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(kind, torch.float32)
    with (
        torch.set_grad_enabled(kind == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
    ):
        answer = module.to(dtype)(rows.to(dtype))
        wanted = F.linear(rows.to(dtype), module[0].weight, module[0].bias)
    assert module[0]._packed is None
    assert torch.equal(answer, wanted)


@needs_kernel
def test_what_has_no_memory_of_its_own_goes_through_the_plain_layer() -> None:
    module, rows = nn.Sequential(nn.Linear(8, 16)), torch.randn(5, 3, 8)
    wanted = F.linear(rows, module[0].weight, module[0].bias)
    pack_digits(module)
    with torch.no_grad():
        mapped = torch.func.vmap(module)(rows)
        assert module[0]._packed is None
        traced = torch.jit.trace(module, torch.zeros(2, 3, 8))
        torch.testing.assert_close(mapped, wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(traced(rows), wanted, atol=1e-6, rtol=1e-5)


@needs_kernel
def test_changed_weights_are_split_anew_and_copies_make_their_own() -> None:
    module = nn.Sequential(nn.Linear(8, 16))
    pack_digits(module, digits=2)
    rows = torch.randn(5, 8)
    with torch.no_grad():
        before = module(rows)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert twin[0].digits == 2
            assert torch.equal(twin(rows), before)
        module[0].weight.mul_(2)
        bias = module[0].bias
        torch.testing.assert_close(module(rows) - bias, 2 * (before - bias))


@pytest.mark.parametrize("count", [0, 4, 2.5])
def test_other_numbers_of_digits_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="digits must be 1, 2 or 3"):
        pack_digits(nn.Sequential(nn.Linear(8, 16)), count)


def _missing(monkeypatch: pytest.MonkeyPatch, what: str, folder: Path) -> None:
    """This machine, or one that has AMX, without one thing that the kernel needs."""
    monkeypatch.setattr(digits, "_processor_features", lambda: frozenset(digits._FEATURES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    if what == "processor":
        monkeypatch.setattr(digits, "_processor_features", lambda: frozenset(("avx512f", "avx2")))
    elif what == "compiler":
        monkeypatch.setattr(digits.shutil, "which", lambda name: None)
    elif what == "source":
        monkeypatch.setattr(digits, "_SOURCE", folder / "broken.cpp")
        (folder / "broken.cpp").write_text("int digits_begin() { return wrong; }")
    elif what == "flags":
        monkeypatch.setenv("CXX", "false")
    else:
        (folder / "sparse_vlm").write_text("a file where the folder should be")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("processor", "lacks avx512bw, avx512dq, avx512vl, amx_tile, amx_int8"),
        ("compiler", "no C\\+\\+ compiler"),
        ("source", "does not compile broken.cpp"),
        ("flags", "false does not compile digits.cpp"),
        ("cache", "cannot be written"),
    ],
)
def test_what_is_missing_is_named_and_layers_stay(
    what: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    _missing(monkeypatch, what, tmp_path)
    module = nn.Sequential(nn.Linear(8, 16))
    with pytest.warns(UserWarning, match=said):
        assert pack_digits(module) == 0
    with pytest.raises(DigitsError, match=said):
        pack_digits(module, strict=True)
    assert type(module[0]) is nn.Linear
    # One that comes from a better machine computes as before.
    moved, rows = DigitLinear(module[0]), torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(moved(rows), module(rows))


@needs_kernel
def test_strict_refuses_what_it_is_not_for() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4).bfloat16())
    with pytest.raises(DigitsError, match=r"these are torch\.bfloat16 on cpu, torch\.float32 on cpu"):
        pack_digits(module, strict=True)
    assert type(module[0]) is nn.Linear
    assert pack_digits(module.float(), strict=True) == 2


@needs_kernel
def test_weights_made_in_inference_mode_are_left_alone_and_it_is_said() -> None:
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(8, 16))
    with pytest.warns(UserWarning, match=r"stay as they are: weights made under torch\.inference_mode\(\)"):
        assert pack_digits(module) == 0
    with pytest.raises(DigitsError, match="load or copy them outside"):
        pack_digits(module, strict=True)
    assert type(module[0]) is nn.Linear


@needs_kernel
def test_the_kernel_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert digits.what_is_missing() is None
    (library,) = (tmp_path / "sparse_vlm").glob("*.so")
    made = library.stat().st_mtime_ns
    for cache in _CACHES:
        cache.cache_clear()
    monkeypatch.setattr(digits.subprocess, "run", None)  # it would fail
    assert digits.what_is_missing() is None
    assert library.stat().st_mtime_ns == made


@needs_kernel
@pytest.mark.real_data
def test_a_real_vit_says_the_same() -> None:
    pytest.importorskip("timm")
    from bootstrap.teacher import load_teacher

    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SPARSE_VLM_REAL_DATA", default))
    if not (folder / "vit_tiny_augreg").is_dir() or not (folder / "imagenet_1000").is_dir():
        pytest.skip(f"no real ViT-Ti and pictures in {folder} (SPARSE_VLM_REAL_DATA)")
    teacher = load_teacher(str(folder / "vit_tiny_augreg"))
    transform = ImageTransform(teacher.spec.transform)
    files = sorted((folder / "imagenet_1000").glob("*.jpg"))[::4]
    ways: dict[str, Callable[[Tensor], Tensor]] = {"fp32": lambda images: teacher(images).pooled}
    for count in (3, 2, 1):
        split = copy.deepcopy(teacher)
        pack_digits(split, count)
        ways[f"{count} digits"] = lambda images, split=split: split(images).pooled
    half = copy.deepcopy(teacher).to_bf16()
    ways["bf16"] = lambda images: half(images).pooled.float()
    logits: dict[str, list[Tensor]] = {name: [] for name in ways}
    with torch.inference_mode():
        for start in range(0, len(files), 50):
            images = torch.stack([transform(Image.open(file)) for file in files[start : start + 50]])
            for name, look in ways.items():
                logits[name].append(look(images))
    plain = torch.cat(logits["fp32"])
    errors, same = {}, {}
    for name in ways:
        other = torch.cat(logits[name])
        errors[name] = float((other - plain).abs().max() / plain.abs().max())
        same[name] = float((other.argmax(1) == plain.argmax(1)).double().mean())
        print(f"{name}: largest difference {errors[name]:.1e}, same label {same[name]:.1%}")
    assert same["3 digits"] == 1
    assert same["2 digits"] >= 0.999
    assert same["1 digits"] >= 0.96
    assert errors["3 digits"] < 1e-5
    assert errors["2 digits"] < 1e-3 < errors["bf16"]
