"""What several test files share: a flag, formula weights, and the official package where there is one."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_vlm import SparseFormer, SparseFormerConfig
from sparse_vlm.convert import name_table
from sparse_vlm.rois import build_initial_rois


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one way to change golden values."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="recompute tests/golden from the official package (needs SPARSEFORMER_REFERENCE)",
    )


def _noise(name: str, shape: torch.Size) -> Tensor:
    """Numbers in [-1, 1) that are a function of name and index alone, the same on every machine."""
    count = shape.numel()
    x = (torch.arange(count, dtype=torch.int64) * 2654435761 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    x = (x >> 16) ^ x
    return (x.double() / 2**31 - 1.0).reshape(shape).float()


def _formula(name: str, shape: torch.Size) -> Tensor:
    noise = _noise(name, shape)
    if name.endswith("initial_rois"):
        return build_initial_rois(shape[0], "half") + 0.05 * noise
    if name.endswith("adjust.weight"):
        return 0.25 * noise / shape[1] ** 0.5  # RoIs move by about a tenth of their size
    if name.endswith("position.weight"):
        return 0.1 * noise / shape[1] ** 0.5  # the code's highest frequency multiplies rounding by 400
    if name.endswith((".weight", ".gamma")) and len(shape) == 1:
        return 1.0 + 0.1 * noise
    if name.endswith(".weight"):
        return 0.5 * noise / shape[1:].numel() ** 0.5
    if name.endswith("bias") and not name.endswith("offset_bias"):
        return 0.1 * noise
    return noise  # embeddings, point offsets


@pytest.fixture(scope="session")
def fill_by_formula() -> Callable[[SparseFormer], SparseFormer]:
    """Give every parameter of an encoder, zero-initialised ones too, a value made from its name."""

    @torch.no_grad()
    def fill(encoder: SparseFormer) -> SparseFormer:
        for name, parameter in encoder.named_parameters():
            parameter.copy_(_formula(name, parameter.shape))
        return encoder

    return fill


@pytest.fixture(scope="session")
def formula_pictures() -> Callable[..., Tensor]:
    """Smooth pictures (B, 3, H, W) made from sines, without a random number."""

    def build(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
        y = torch.linspace(0, 1, height, dtype=torch.float64).view(1, 1, height, 1)
        x = torch.linspace(0, 1, width, dtype=torch.float64).view(1, 1, 1, width)
        phase = torch.arange(batch * 3, dtype=torch.float64).view(batch, 3, 1, 1)
        waves = (9 * x + phase).sin() + (14 * y * (1 + 0.1 * phase)).cos() + (21 * x * y + 2 * phase).sin()
        return waves.float()

    return build


@pytest.fixture(scope="session")
def official_root() -> Path:
    """The folder of a checkout of showlab/sparseformer."""
    root = os.environ.get("SPARSEFORMER_REFERENCE")
    if not root:
        pytest.skip("set SPARSEFORMER_REFERENCE to a checkout of github.com/showlab/sparseformer")
    if not Path(root, "sparseformer", "sparseformer", "modeling.py").is_file():
        pytest.fail(f"SPARSEFORMER_REFERENCE={root} is no checkout of showlab/sparseformer")
    return Path(root)


@pytest.fixture(scope="session")
def official(official_root: Path) -> SimpleNamespace:
    """The official package's modules, and what it takes to run it beside ours."""
    pytest.importorskip("timm", reason="the official package imports timm")
    sys.path.insert(0, str(official_root / "sparseformer"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = importlib.import_module("sparseformer.config")
        modeling = importlib.import_module("sparseformer.modeling")

    def build(config: SparseFormerConfig) -> Any:
        """An official model of our architecture, in the official constructor's words."""
        operations = {
            "attention": modeling.OP.ATTN,
            "mlp": modeling.OP.MLP,
            "sample": modeling.OP.SAMPLING_M,
            "adjust": modeling.OP.ROI_ADJ,
            "position": modeling.OP.PE_INJECT,
        }
        orders = [config.focusing_order, config.handover_order, *[("attention", "mlp")] * config.depth]
        attributes = names.make_btsp_attr() if config.adjust_hidden else names.make_v1_attr()
        attributes.update(clip_quick_gelu=config.activation == "quick_gelu")
        if config.adjust_hidden:
            attributes.update(pg_inner_dim=config.generator_width)
        return modeling.SparseFormer(
            conv_dim=config.stem_channels,
            num_latent_tokens=config.num_latents,
            same_token_embedding=config.token_embedding == "shared",
            cls_token_insert_layer=2 if config.cls_token else -1,
            num_sampling_points=config.num_points,
            width_configs=[config.focusing_width, *[config.width] * (config.depth + 1)],
            repeats=[config.focusing_repeats, *[1] * (config.depth + 1)],
            ops_list=[[operations[word] for word in order] for order in orders],
            head_op="cls" if config.pooling == "cls" else "avg",
            proj_dim=config.output_width,
            proj_bias=config.head_bias,
            compatible_config=attributes,
        ).eval()

    def build_published(name: str) -> Any:
        """One of the official package's own seven models."""
        return modeling.SparseFormer(**names.route_name_to_config(name)).eval()

    @torch.no_grad()
    def run(model: Any, pictures: Tensor) -> dict[str, Tensor]:
        """Tokens, pooled output, and RoIs and points of every sampling step of an official model."""
        values: dict[str, Tensor] = {}
        for unit in (m for m in model.modules() if isinstance(m, modeling.SFUnit)):

            def record(roi: Tensor, *rest: Any, place: Any = unit.op_make_absolute_sampling_point) -> Tensor:
                points = place(roi, *rest)
                step = sum(name.startswith("rois.") for name in values)
                values[f"rois.{step}"] = roi.clone()
                values[f"points.{step}"] = points[:, :, 0].clone()  # (B, N, P, 2)
                return points

            unit.op_make_absolute_sampling_point = record
        model.debug_returns = False
        pooled = model(pictures)
        values.clear()
        model.debug_returns = True
        tokens = model(pictures)["token_embedding"]
        return {"tokens": tokens, "pooled": pooled, **values}

    return SimpleNamespace(build=build, build_published=build_published, run=run)


@pytest.fixture(scope="session")
def to_official() -> Callable[[SparseFormer], dict[str, Tensor]]:
    """An encoder's weights under the newest official names and shapes."""

    def rename(encoder: SparseFormer) -> dict[str, Tensor]:
        weights: Mapping[str, Tensor] = encoder.state_dict()
        state_dict = {
            official: weights[ours].clone() for official, ours in name_table(encoder.config).items()
        }
        for name, value in state_dict.items():
            if name.endswith("roi_offset_bias"):
                state_dict[name] = value.flatten()
            elif name == "cls_embedding.weight":
                state_dict[name] = value.reshape(1, -1)
        return state_dict

    return rename


@pytest.fixture(scope="session")
def run_ours() -> Callable[[SparseFormer, Tensor], dict[str, Tensor]]:
    """What `official.run` returns, from our encoder."""

    @torch.no_grad()
    def run(encoder: SparseFormer, pictures: Tensor) -> dict[str, Tensor]:
        output, focus = encoder(pictures), encoder.focus(pictures)
        values = {"tokens": output.tokens, "pooled": output.pooled}
        for step, (rois, points) in enumerate(zip(output.rois, focus.points, strict=True)):
            values[f"rois.{step}"] = rois
            values[f"points.{step}"] = points
        return values

    return run


@pytest.fixture
def stand_in_graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """CUDA graphs without CUDA: a recording runs its work again and writes where it wrote before.

    Returns:
        The shapes of the pictures of all recordings, in order.
    """
    from sparse_vlm import graphed_calls

    recorded: list[tuple[int, ...]] = []

    def capture(work: Callable[[], Any], pictures: Tensor) -> tuple[Callable[[], None], Any]:
        assert not torch.is_grad_enabled()
        recorded.append(tuple(pictures.shape))
        output = work()

        def replay() -> None:
            for place, value in zip(_tensors(output), _tensors(work()), strict=True):
                place.copy_(value)

        return replay, output

    monkeypatch.setattr(graphed_calls, "_capture", capture)
    monkeypatch.setattr(graphed_calls.GraphedCalls, "_check_devices", lambda calls: None)
    return recorded


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
