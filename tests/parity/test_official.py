"""Our encoder against the official package: same weights, same pictures, same tokens, outputs and RoIs.

Run it with SPARSEFORMER_REFERENCE naming a checkout of github.com/showlab/sparseformer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sparse_vlm import PRESETS, SparseFormer, build_encoder
from sparse_vlm.convert import convert_state_dict, guess_preset, name_table, rename_older

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", PRESETS)
def test_published_model_equals_official(
    name: str,
    official: SimpleNamespace,
    fill_by_formula: Callable[[SparseFormer], SparseFormer],
    formula_pictures: Callable[..., Tensor],
    to_official: Callable[[SparseFormer], dict[str, Tensor]],
    run_ours: Callable[[SparseFormer, Tensor], dict[str, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = fill_by_formula(build_encoder(name)).eval()
    model = official.build_published(name)
    model.load_state_dict(to_official(encoder), strict=True)

    guessed, config = guess_preset(model.state_dict())
    assert (guessed, config) == (name, PRESETS[name][0])
    converted = convert_state_dict(model.state_dict(), config)
    for key, value in encoder.state_dict().items():
        assert torch.equal(converted[key], value), key

    pictures = formula_pictures(1, 224, 224)
    theirs, ours = official.run(model, pictures), run_ours(encoder, pictures)
    moved = (ours["rois.4"] - ours["rois.0"]).abs().max().item()
    assert moved > 0.05  # otherwise equal RoIs would mean nothing
    differences = _differences(ours, theirs)
    # In fp64 nothing is left but the functions themselves.
    exact = _differences(
        run_ours(encoder.double(), pictures.double()), official.run(model.double(), pictures.double())
    )
    with capsys.disabled():
        print(
            f"\n{name}: RoIs move by up to {moved:.2f}; fp32 {_summary(differences)}; fp64 {_summary(exact)}"
        )
    assert max(differences.values()) < 1e-5, differences
    assert max(exact.values()) < 1e-10, exact


def test_names_of_the_v1_training_code(official_root: Path) -> None:
    path = official_root / "imagenet" / "models" / "sparseformer.py"
    spec = importlib.util.spec_from_file_location("official_v1_training", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state_dict = module.SparseFormer().state_dict()
    name, config = guess_preset(state_dict)
    assert name == "sparseformer_v1_tiny"
    assert set(rename_older(state_dict)) == set(name_table(config))
    weights = convert_state_dict(state_dict, config)
    assert torch.equal(weights["cortex.blocks.6.attn.qkv.weight"], state_dict["layers.9.attn.in_proj_weight"])


def _differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor: in fractions of the picture for RoIs and points, else in fractions
    of the tensor's largest value."""
    assert ours.keys() == theirs.keys()
    return {
        key: (ours[key] - theirs[key]).abs().max().item()
        / (1.0 if key.startswith(("rois", "points")) else theirs[key].abs().max().item())
        for key in ours
    }


def _summary(differences: dict[str, float]) -> str:
    groups = {
        group: max(value for key, value in differences.items() if key.startswith(group))
        for group in ("tokens", "pooled", "rois", "points")
    }
    return ", ".join(f"{group} {value:.1e}" for group, value in groups.items())
