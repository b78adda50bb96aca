"""Whole outputs of tiny models, computed once by the official package in fp64 from formula weights.

They change only by `pytest tests/golden --update-golden`, with SPARSEFORMER_REFERENCE naming a checkout of
github.com/showlab/sparseformer. Weights and pictures are formulas (tests/conftest.py) and need no file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_vlm import PRESETS, SparseFormer, SparseFormerConfig, build_encoder

FOLDER = Path(__file__).parent

_V1_TINY = PRESETS["sparseformer_v1_tiny"][0].replace(
    stem_channels=6,
    num_latents=9,
    focusing_width=64,
    focusing_mlp_width=256,
    focusing_repeats=3,
    generator_width=16,
    handover_generator_width=32,
    num_points=9,
    mixing_points=32,
    width=128,
    mlp_width=512,
    depth=2,
    output_width=7,
)


def _bootstrapped(name: str, **changes: object) -> SparseFormerConfig:
    return PRESETS[name][0].replace(
        stem_channels=6,
        num_latents=11,
        focusing_width=64,
        focusing_heads=1,
        focusing_mlp_width=256,
        generator_width=24,
        handover_generator_width=24,
        num_points=4,
        width=128,
        heads=2,
        mlp_width=512,
        depth=2,
        output_width=7,
        **changes,
    )


FAMILIES = {
    "v1": _V1_TINY,
    "augreg": _bootstrapped("sparseformer_btsp_augreg_base"),
    "clip": _bootstrapped("sparseformer_btsp_openai_clip_base", focusing_repeats=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_golden(
    family: str,
    request: pytest.FixtureRequest,
    fill_by_formula: Callable[[SparseFormer], SparseFormer],
    formula_pictures: Callable[..., Tensor],
    to_official: Callable[[SparseFormer], dict[str, Tensor]],
    run_ours: Callable[[SparseFormer, Tensor], dict[str, Tensor]],
) -> None:
    encoder = fill_by_formula(build_encoder(FAMILIES[family])).eval()
    pictures = formula_pictures(2, 48, 80)
    path = FOLDER / f"{family}.safetensors"
    if request.config.getoption("--update-golden"):
        official = request.getfixturevalue("official")
        model = official.build(FAMILIES[family])
        model.load_state_dict(to_official(encoder), strict=True)
        values = official.run(model.double(), pictures.double())
        save_file({key: value.float().contiguous() for key, value in values.items()}, str(path))
    golden = load_file(str(path))

    exact = run_ours(encoder.double(), pictures.double())
    assert exact.keys() == golden.keys()
    for key, value in golden.items():
        torch.testing.assert_close(
            exact[key].float(), value, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    single = run_ours(encoder.float(), pictures)
    for key, value in golden.items():
        torch.testing.assert_close(single[key], value, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_golden_values_say_something() -> None:
    for family, config in FAMILIES.items():
        golden = load_file(str(FOLDER / f"{family}.safetensors"))
        steps = config.focusing_repeats + 1
        assert sum(key.startswith("rois.") for key in golden) == steps
        assert (golden[f"rois.{steps - 1}"] - golden["rois.0"]).abs().max() > 0.01
        assert golden["tokens"].std() > 0.1
        assert not torch.allclose(golden["pooled"][0], golden["pooled"][1])
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) < 200_000
