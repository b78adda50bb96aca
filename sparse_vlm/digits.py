"""Linear layers in fp32 by products of whole numbers: for inference on an x86 CPU with AMX.

Such a processor does 32 times as many operations a cycle on 8-bit whole numbers as in fp32 (2,048 and 64).
So a row of the input and a row of the weight are each written as digits in base 256, times one number that
makes the row's largest entry the largest that fits. Pairs of digits are multiplied and summed without
rounding, and the sums put together in fp32: the scheme of Ozaki et al. (Numerical Algorithms 59, 2012), on
whole numbers Ootomo et al. (arXiv 2306.11975). Three digits have the 24 bits of fp32, two have 16, one has 8,
counted from the row's largest entry. In rows of about one size, as a layer norm leaves them, errors of three
digits are no larger than those of a product in fp32; where one entry is far larger than the others, and the
weight gives it no say, the others have fewer bits.

>>> from sparse_vlm.digits import pack_digits
>>> pack_digits(encoder)                         # doctest: +SKIP
50

Names, parameters and files stay what they are. Wherever digits do not apply (gradients wanted, another device
or precision, autocast, a compiler, torch.func, a tracer), a layer computes as before. A row with a number
that is not finite gives rows that are not numbers; a row whose entries are all below 1e-30 counts as zero.

The kernel is ``digits.cpp``. It is compiled when it is first asked for, in a second or two, and kept in
``$XDG_CACHE_HOME/sparse_vlm`` (``~/.cache/sparse_vlm``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .atomic import write_atomic
from .packed import PackedLinear, replace_linears

_SOURCE = Path(__file__).with_name("digits.cpp")
_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "amx_tile", "amx_int8")
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp"),
    *(f"-m{feature.replace('_', '-')}" for feature in _FEATURES),
)
_DEPTH, _WIDE = 64, 16  # features and outputs of a weight tile
_SMALLEST = 1e-30  # kSmallest in the kernel
# Longer sums of products of digits could leave 32 bits.
_MAX_FEATURES = 32768
# Largest error of a small product, as a share of its largest entry.
_TOLERANCE = {1: 5e-2, 2: 5e-4, 3: 5e-6}


class DigitsError(RuntimeError):
    """This machine cannot run the kernel; the message says what it lacks."""


class DigitWeight(NamedTuple):
    """A weight (out, in) in digits.

    Attributes:
        tiles: (out / 16, in / 64, digits, 16, 16, 4), int8, padded with zeros: the features of a tile by
            fours, its outputs, and four features.
        scales: (out,), fp32: what the sums of an output are multiplied by.
        features: in.
    """

    tiles: Tensor
    scales: Tensor
    features: int


class DigitLinear(PackedLinear):
    """A linear layer that multiplies digits for inference in fp32.

    Args:
        linear: the layer whose parameters it shares.
        digits: how many digits a number has, 1 to 3.
    """

    def __init__(self, linear: nn.Linear, digits: int = 3) -> None:
        super().__init__(linear)
        self.digits = digits

    def _fits(self, input: Tensor) -> bool:
        return (
            input.dtype == torch.float32
            and input.numel() > 0
            and self.in_features <= _MAX_FEATURES
            and (self.bias is None or self.bias.dtype == torch.float32)
            and what_is_missing() is None  # a copy may have come from another machine
        )

    def _reorder(self, weight: Tensor) -> DigitWeight:
        return split_weight(weight, self.digits)

    def _multiply(self, input: Tensor, packed: DigitWeight) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        return multiply_digits(rows, packed, self.bias).view(*input.shape[:-1], self.out_features)


def pack_digits(module: nn.Module, digits: int = 3, strict: bool = False) -> int:
    """Replace the linear layers below a module by ones that multiply digits, in place.

    Args:
        module: an encoder, usually, in fp32. Digits take a byte each beside the four of every weight.
        digits: 3 for what fp32 says, 2 for errors of some 1e-4 of the largest entry, 1 for some 1e-2.
        strict: refuse a machine or a module that this is not for, instead of leaving it as it is.

    Returns:
        How many layers were replaced; 0, with a warning that says why, where the kernel does not run, or
        weights were made under ``torch.inference_mode()``.

    Raises:
        ValueError: for another number of digits.
        DigitsError: if ``strict``, for the same reasons, or where weights are not in fp32 on the CPU.
    """
    if digits not in _TOLERANCE:
        raise ValueError(f"digits must be 1, 2 or 3, got {digits!r}")
    missing = what_is_missing()
    if missing is None and any(p.is_inference() for p in module.parameters()):
        missing = (
            "weights made under torch.inference_mode() do not tell when they change; "
            "load or copy them outside"
        )
    if strict and missing is None:
        missing = _find_unfit(module)
    if missing is not None:
        if strict:
            raise DigitsError(missing)
        warnings.warn(f"linear layers stay as they are: {missing}", stacklevel=2)
        return 0
    return replace_linears(module, functools.partial(DigitLinear, digits=digits))


def _find_unfit(module: nn.Module) -> str | None:
    kinds = {(p.device.type, p.dtype) for p in module.parameters() if p.is_floating_point()}
    if kinds == {("cpu", torch.float32)}:
        return None
    found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
    return f"digits are for weights in torch.float32 on cpu, and these are {found}"


def split_weight(weight: Tensor, digits: int) -> DigitWeight:
    """Write a weight (out, in) in fp32, on the CPU, as digits, in the kernel's order."""
    outputs, features = weight.shape
    top = int.from_bytes(b"\x7f" * digits, "big")  # 127 in every digit
    half = int.from_bytes(b"\x80" * digits, "big")
    largest = weight.abs().amax(dim=1).double()
    # In fp64: rounding may not carry beyond the first digit.
    factors = torch.where(largest >= _SMALLEST, top / largest, 0.0)
    finite = largest.isfinite()
    whole = (weight * factors.unsqueeze(1)).round_().where(finite.unsqueeze(1), 0.0).to(torch.int32)
    # With half of the base added to every digit none of them is negative; flipping the top bit takes it off.
    bytes_up = ((whole + half) ^ half).contiguous().view(torch.int8).view(outputs, features, 4)
    tiles = bytes_up[..., :digits].flip(-1)  # the first digit first
    tiles = F.pad(tiles, (0, 0, 0, -features % _DEPTH, 0, -outputs % _WIDE))
    tiles = tiles.view(-(-outputs // _WIDE), _WIDE, -(-features // _DEPTH), _DEPTH // 4, 4, digits)
    scales = (largest / top * 256.0 ** (digits - 1)).where(finite, torch.nan)
    return DigitWeight(tiles.permute(0, 2, 5, 3, 1, 4).contiguous(), scales.float(), features)


def multiply_digits(rows: Tensor, weight: DigitWeight, bias: Tensor | None = None) -> Tensor:
    """A linear layer.

    Args:
        rows: (R, in), fp32, on the CPU.
        weight: from :func:`split_weight`.
        bias: (out,), fp32.

    Returns:
        (R, out), fp32. With k digits of rows x and weights w, each entry is off by no more than some
        in · max|x| · max|w| · 2^(1 - 8k), beside the rounding of fp32.

    Raises:
        DigitsError: where the kernel does not run.
        ValueError: if the operands do not fit each other, are not in fp32 or not on the CPU.
    """
    kernel = _load_kernel()
    _check_operands(rows, weight, bias)
    rows = rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    (count, features), (outputs, digits) = rows.shape, (weight.scales.numel(), weight.tiles.shape[2])
    output = torch.empty(count, outputs, dtype=torch.float32, device="cpu")
    room = kernel.digits_scratch(digits, count, features)
    scratch = torch.empty(room, dtype=torch.uint8, device="cpu")
    kernel.digits_linear(
        digits,
        rows.data_ptr(),
        count,
        features,
        weight.tiles.data_ptr(),
        weight.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        outputs,
        output.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def _check_operands(rows: Tensor, weight: DigitWeight, bias: Tensor | None) -> None:
    """The kernel reads memory as it is told to: nothing may reach it that is not what it takes it for."""
    outputs = weight.scales.numel()
    if tuple(rows.shape[1:]) != (weight.features,) or (bias is not None and tuple(bias.shape) != (outputs,)):
        raise ValueError(
            f"rows must be (R, {weight.features}) and the bias ({outputs},), got {tuple(rows.shape)}"
            + ("" if bias is None else f" and {tuple(bias.shape)}")
        )
    for name, tensor in (("rows", rows), ("the bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device.type) != (torch.float32, "cpu"):
            raise ValueError(f"{name} must be torch.float32 on cpu, got {tensor.dtype} on {tensor.device}")


@functools.cache
def what_is_missing() -> str | None:
    """What keeps this machine from multiplying digits; None if nothing does.

    Asked once: the kernel is compiled if it was not yet, and a small product of each kind held to fp64.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    rows, weight = (
        torch.randn(count, 100, generator=generator, dtype=torch.float32, device="cpu") for count in (17, 33)
    )
    wanted = rows.double() @ weight.double().T
    try:
        for digits, tolerance in _TOLERANCE.items():
            product = multiply_digits(rows, split_weight(weight, digits))
            error = float((product - wanted).abs().max() / wanted.abs().max())
            if not error <= tolerance:
                return f"the compiled kernel is wrong by {error:.1e} with {digits} digits"
    except DigitsError as error:
        return str(error)
    return None


@functools.cache
def _load_kernel() -> ctypes.CDLL:
    missing = [feature for feature in _FEATURES if feature not in _processor_features()]
    if missing:
        raise DigitsError(f"this processor lacks {', '.join(missing)}")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    try:
        kernel = ctypes.CDLL(str(_compile()))
    except OSError as error:
        raise DigitsError(f"the compiled kernel does not load: {error}") from error
    kernel.digits_scratch.restype = ctypes.c_size_t
    kernel.digits_linear.restype = None
    kernel.digits_linear.argtypes = [
        *(number, pointer, number, number, pointer, pointer, pointer, number, pointer, pointer, number)
    ]
    if kernel.digits_begin() != 0:
        raise DigitsError("the operating system does not give AMX to this process")
    return kernel


@functools.cache
def _processor_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(flags, "").split())


def _compile() -> Path:
    """The kernel's library, compiled into the cache unless it is there."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise DigitsError("there is no C++ compiler (g++, clang++ or c++; CXX names one)")
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join((source, " ".join(_FLAGS).encode(), compiler.encode()))).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_vlm"
    library = cache / f"digits_{key}.so"

    def build(target: Path) -> None:
        """Compile to a file; :func:`write_atomic` puts it in its place."""
        command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            said = result.stderr.strip().splitlines()
            raise DigitsError(
                f"{compiler} does not compile {_SOURCE.name}: {said[-1] if said else result.returncode}"
            )

    if not library.is_file():
        try:
            write_atomic(library, build)
        except OSError as error:
            raise DigitsError(f"{library} cannot be written: {error}") from error
    return library
