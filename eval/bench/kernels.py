"""Our kernels against the plain PyTorch that they stand for, each alone, on an encoder's shapes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eval.answers import InputError
from eval.bench.rivals import build_ours
from eval.bench.turns import format_spread, ratio, table, take_turns
from eval.costs.clock import Timing
from sparse_vlm import SparseFormer, agreement, rois
from sparse_vlm.activations import quick_gelu_gradient_plain, quick_gelu_plain
from sparse_vlm.fused import Sight, look_fused, look_plain
from sparse_vlm.norms import pool_norm_plain
from sparse_vlm.sampling_plain import sample_gradients_plain, sample_plain
from sparse_vlm.stem import convolve_cells, convolve_plain

_SIDE = 224
_IN_A_ROW = 10  # one alone takes no longer than it takes to be waited for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench kernels`."""
    parser.add_argument("--preset", default="sparseformer_btsp_openai_clip_large", help="our architecture")
    parser.add_argument("--batch", type=int, default=256, help="pictures at once (default 256)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times each kernel and its plain path in turn.

    Raises:
        InputError: Where no kernel of ours runs.
    """
    if torch.device(options.device).type not in agreement.DEVICES:
        raise InputError("kernels: they run on a GPU; give --device cuda.")
    if options.batch < 1:
        raise InputError("--batch must be at least 1.")
    encoder = build_ours(options.preset).requires_grad_(False).to(options.device, options.torch_dtype)
    pairs = _build_pairs(encoder, options.batch)
    works: dict[str, Callable[[], Any]] = {}
    for name, (plain, ours) in pairs.items():
        works[f"{name}, plain"], works[name] = _repeat(plain), _repeat(ours)
    with torch.no_grad():
        laps = take_turns(works, options.rounds, options.device)
    kernels = {}
    for name in pairs:
        slow, fast = laps[f"{name}, plain"], laps[name]
        kernels[name] = {
            "plain_ms": 1e3 * slow.summary("wall").median / _IN_A_ROW,
            "ms": 1e3 * fast.summary("wall").median / _IN_A_ROW,
            "times_faster": vars(ratio(slow, fast, "wall")),
        }
    return {"preset": options.preset, "batch": options.batch, "kernels": kernels}


def _build_pairs(encoder: SparseFormer, batch: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By name: the plain path, and what stands for it."""
    # Triton is there where kernels run.
    from sparse_vlm.activation_kernel import launch_quick_gelu, launch_quick_gelu_gradient
    from sparse_vlm.norm_kernel import launch_add_norm, launch_pool_norm
    from sparse_vlm.roi_kernel import launch_adjust, launch_encode, launch_place
    from sparse_vlm.sampling_kernel import launch_gradients, launch_samples

    config, device, dtype = encoder.config, encoder.device, encoder.dtype
    weight, bias = encoder.stem.conv.weight, encoder.stem.conv.bias
    images = torch.randn(batch, 3, _SIDE, _SIDE, device=device, dtype=dtype)
    convolved = convolve_plain(images, weight)
    feature_map = pool_norm_plain(convolved, bias)
    channels, count = config.stem_channels, config.num_latents
    points = torch.rand(batch, count, config.num_points, 2, device=device)
    gradient = torch.randn(batch, count, config.num_points, channels, device=device, dtype=dtype)
    sizes = (channels**2, config.mixing_points * config.num_points)
    generated = torch.randn(batch, count, sum(sizes), device=device, dtype=dtype)
    by_channel, by_point = generated.split(sizes, dim=-1)
    sight = Sight(
        feature_map,
        points,
        by_channel.unflatten(-1, (channels, channels)),
        by_point.unflatten(-1, (config.mixing_points, config.num_points)),
    )
    tokens, update = torch.randn(2, batch, config.num_tokens, config.width, device=device, dtype=dtype)
    norm = torch.nn.LayerNorm(config.width).to(device, dtype)
    boxes = torch.rand(batch, count, 4, device=device)
    offsets = torch.randn(batch, count, config.num_points, 2, device=device, dtype=dtype)
    shift, deltas = offsets[0, 0], torch.randn(batch, count, 4, device=device, dtype=dtype)
    width, temperature = config.focusing_width, config.position_temperature
    hidden = torch.randn(batch, config.num_tokens, config.mlp_width, device=device, dtype=dtype)

    def add_norm_plain() -> tuple[Tensor, Tensor]:
        added = tokens + update
        return added, norm(added)

    return {
        "look": (lambda: look_plain(sight), lambda: look_fused(sight)),
        "reading points": (
            lambda: sample_plain(feature_map, points, "border"),
            lambda: launch_samples(feature_map, points, False),
        ),
        "gradients of reading": (
            lambda: sample_gradients_plain(gradient, feature_map, points, "border"),
            lambda: launch_gradients(gradient, feature_map, points, False),
        ),
        "placing points": (
            lambda: rois.place_points(boxes, shift.float() + offsets.float()),
            lambda: launch_place(boxes, offsets, shift, 1e-5),
        ),
        "moving RoIs": (lambda: rois.adjust_rois(boxes, deltas), lambda: launch_adjust(boxes, deltas)),
        "position codes": (
            lambda: rois.encode_rois(boxes, width, temperature).to(dtype),
            lambda: launch_encode(boxes, width, temperature, dtype),
        ),
        "stem, convolution": (
            lambda: convolve_plain(images, weight),
            lambda: convolve_cells(images, weight),
        ),
        "stem, pooling and norm": (
            lambda: pool_norm_plain(convolved, bias),
            lambda: launch_pool_norm(convolved, bias, 1e-5),
        ),
        "norm": (
            lambda: norm(tokens),
            lambda: launch_add_norm(tokens, None, norm.weight, norm.bias, norm.eps),
        ),
        "sum and norm": (
            add_norm_plain,
            lambda: launch_add_norm(tokens, update, norm.weight, norm.bias, norm.eps),
        ),
        "QuickGELU": (lambda: quick_gelu_plain(hidden), lambda: launch_quick_gelu(hidden)),
        "gradient of QuickGELU": (
            lambda: quick_gelu_gradient_plain(hidden, hidden),
            lambda: launch_quick_gelu_gradient(hidden, hidden),
        ),
    }


def _repeat(work: Callable[[], Any]) -> Callable[[], Any]:
    def several() -> None:
        for _ in range(_IN_A_ROW):
            work()

    return several


def show(report: dict[str, Any]) -> str:
    """Milliseconds of one call, and how many times faster ours is."""
    rows = [
        [
            name,
            f"{row['plain_ms']:.3f}",
            f"{row['ms']:.3f}",
            format_spread(Timing(**row["times_faster"])),
        ]
        for name, row in report["kernels"].items()
    ]
    head = ["", "plain ms", "ours ms", "times faster"]
    return f"{report['preset']}, batch {report['batch']}\n" + table(head, rows)
