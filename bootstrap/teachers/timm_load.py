"""Loading timm's ViTs: by name with a checkpoint file, from a folder in timm's hub layout, or downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from .files import describe_misfit, find_weights
from .spec import TeacherError
from .timm_vit import TimmTrunk

_PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth")


def load_timm_file(model_name: str, file: Path, name: str) -> TimmTrunk:
    """An architecture timm knows, with a checkpoint file; offline.

    No checkpoint tells how pictures are prepared for it: a tag (``MODEL.TAG``) does, and without one they are
    prepared as for the weights that timm has first under the model's name.
    """
    state_dict = _read(file)
    head = state_dict.get("head.weight")
    classes = 0 if head is None else head.shape[0]
    model = _create(name, lambda: timm.create_model(model_name, pretrained=False, num_classes=classes))
    _fill(model, state_dict, file, name)
    if "." not in model_name:
        _warn_of_preparation(model_name, name)
    return TimmTrunk(model, name)


def _warn_of_preparation(model_name: str, name: str) -> None:
    """Say which preparation is taken where timm has several under one name."""
    tags = [tag.partition(".")[2] for tag in timm.list_pretrained(f"{model_name}.*")]
    ways = {tag: _preparation(f"{model_name}.{tag}") for tag in tags}
    chosen = _preparation(model_name)
    others = sorted(tag for tag, way in ways.items() if way != chosen)
    if others:
        warnings.warn(
            f"teacher {name!r}: pictures are prepared with {chosen}; those of the weights that timm has as "
            f"{', '.join(others)} are prepared otherwise: if they are yours, write timm:{model_name}.TAG",
            stacklevel=4,
        )


def _preparation(model_name: str) -> dict[str, Any]:
    config = timm.get_pretrained_cfg(model_name)
    return {key: getattr(config, key, None) for key in _PREPARATION}


def load_timm_folder(folder: Path, config: dict[str, Any]) -> TimmTrunk:
    """A folder in timm's hub layout: ``config.json`` with an architecture, and the weights; offline."""
    name = str(folder)
    pretrained_cfg = config.get("pretrained_cfg") or {
        key: value for key, value in config.items() if key != "architecture"
    }
    options = dict(config.get("model_args") or {})
    for key in ("num_classes", "global_pool"):
        if config.get(key) is not None:
            options.setdefault(key, config[key])
    model = _create(
        name,
        lambda: timm.create_model(
            config["architecture"], pretrained=False, pretrained_cfg=pretrained_cfg, **options
        ),
    )
    file = find_weights(folder, _WEIGHT_NAMES)
    _fill(model, _read(file), file, name)
    return TimmTrunk(model, name)


def load_timm_pretrained(model_name: str, name: str) -> TimmTrunk:
    """An architecture timm knows with its published weights; downloads them unless they are cached."""
    return TimmTrunk(_create(name, lambda: timm.create_model(model_name, pretrained=True)), name)


def _create(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:
        raise TeacherError(f"teacher {name!r}: timm cannot build it: {error}") from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        state_dict = load_state_dict(str(file), weights_only=True)
    except Exception as error:
        raise TeacherError(f"{file} cannot be read as a checkpoint: {error}") from error
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        raise TeacherError(f"{file} holds no tensors")
    return tensors


def _fill(model: nn.Module, state_dict: dict[str, Tensor], file: Path, name: str) -> None:
    try:
        model.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise TeacherError(
            f"teacher {name!r}: {file} holds the weights of another model: {describe_misfit(error)}"
        ) from None
