"""A tiny teacher in open_clip's own directory format, and a folder of pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

TINY_CLIP = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
TINY_STUDENT = {
    "stem_channels": 8,
    "num_latents": 4,
    "focusing_width": 16,
    "focusing_heads": 2,
    "focusing_mlp_width": 32,
    "focusing_repeats": 2,
    "num_points": 4,
    "mixing_points": 4,
    "generator_width": 8,
    "handover_generator_width": 8,
}


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of three blocks, saved as open_clip saves."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = CLIP(**TINY_CLIP)  # type: ignore[arg-type]
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        str(folder / "open_clip_model.safetensors"),
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small pictures of smooth noise; their names begin with a class index."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 36), Image.Resampling.BICUBIC).save(
            folder / f"{number % 3}_x{number}.png"
        )
    return folder


@pytest.fixture(scope="session")
def heldout_folder(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in files of their own."""
    return Path(shutil.copytree(picture_folder, tmp_path_factory.mktemp("heldout") / "pictures"))


@pytest.fixture
def write_run(tmp_path: Path, tiny_teacher: Path, picture_folder: Path) -> Callable[..., Path]:
    """Write the settings of a tiny run; keyword arguments replace top-level keys."""

    def write(name: str = "run", **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "out": str(tmp_path / name),
            "teacher": {"name": str(tiny_teacher)},
            "student": {"architecture": TINY_STUDENT},
            "data": {"source": str(picture_folder), "workers": 0},
            "steps": 6,
            "batch_size": 4,
            "log_every": 1,
            "save_every": 2,
            "device": "cpu",
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
