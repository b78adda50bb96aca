"""The encoder directory: everything that rebuilds an encoder, offline, and says where it came from.

=============================  ==========================================================================
``config.json``                format, version and architecture
``model.safetensors``          the weights, under this library's names
``preprocessor_config.json``   the image transform, in the fields of transformers' image processors
``provenance.json``            teacher, data, steps, commit, package versions, seed, figures reached
=============================  ==========================================================================

It is written atomically and read strictly: a missing, extra or misshapen tensor is an error that names all of
them. There is no pickle in it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
from safetensors.torch import load_file, save_file

from .atomic import atomic_directory, recover_directory
from .config import SparseFormerConfig
from .encoder import SparseFormer
from .preprocessor import from_preprocessor_dict, to_preprocessor_dict
from .presets import load_preset
from .transform import TransformConfig

FORMAT = "sparse_vlm.encoder"
FORMAT_VERSION = 1
MODEL_TYPE = "sparseformer_vision"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROVENANCE_FILE = "provenance.json"
OWNED = (CONFIG_FILE, WEIGHTS_FILE, PREPROCESSOR_FILE, PROVENANCE_FILE)

# Software that takes any folder for a CLIP checkpoint would build a randomly initialised CLIP from this one
# and go on. An activation that no CLIP knows makes it stop, and this sentence is what it prints.
_NOT_A_CLIP = "none: this directory holds a SparseFormer of sparse_vlm, not a CLIP checkpoint"


class EncoderDirectoryError(ValueError):
    """An encoder directory that cannot be read, with what is wrong and where."""


def build_encoder(
    preset_or_config: str | SparseFormerConfig, transform: TransformConfig | None = None
) -> SparseFormer:
    """Build a randomly initialised encoder in memory.

    Args:
        preset_or_config: a name of :data:`sparse_vlm.presets.PRESETS`, or an architecture.
        transform: the image transform; a preset brings its own.

    Raises:
        ValueError: for an unknown preset.
    """
    if isinstance(preset_or_config, str):
        config, preset_transform = load_preset(preset_or_config)
        return SparseFormer(config, transform or preset_transform)
    return SparseFormer(preset_or_config, transform)


def save_encoder(
    encoder: SparseFormer, directory: str | PathLike[str], provenance: Mapping[str, Any] | None = None
) -> None:
    """Write an encoder directory, atomically.

    Args:
        encoder: the encoder to write, in the precision it has.
        directory: where to. An encoder directory already there is replaced; one that holds anything else
            is refused.
        provenance: what is known about the weights. Package versions and the time are added.

    Raises:
        ValueError: if the weights are no longer those of the architecture, so that no one could load them.
        FileExistsError: if the directory holds files that would be lost.
        OSError: if the disk is full; what was there before is intact.
    """
    with torch.device("meta"):
        wanted = SparseFormer(encoder.config).state_dict()
    if problems := _compare(encoder.state_dict(), wanted):
        raise ValueError(
            f"nothing is saved to {directory}, for the encoder's weights are not those of its architecture "
            f"({len(problems)} tensors); gather what is sharded (ZeRO-3), merge adapters (LoRA), undo "
            "quantisation first: " + "; ".join(problems)
        )
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model_type": MODEL_TYPE,
        "hidden_act": _NOT_A_CLIP,
        "num_tokens": encoder.num_tokens,
        "architecture": encoder.config.to_dict(),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    with atomic_directory(directory, owned=OWNED) as folder:
        save_file(weights, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
        _write_json(folder / CONFIG_FILE, config)
        _write_json(folder / PREPROCESSOR_FILE, to_preprocessor_dict(encoder.transform.config))
        _write_json(folder / PROVENANCE_FILE, {**dict(provenance or {}), **_describe_software()})


def load_encoder(
    directory: str | PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SparseFormer:
    """Rebuild an encoder from its directory, in evaluation mode.

    Its weights are ordinary ones under ``torch.inference_mode()`` too: they can be packed, and tuned later.

    Args:
        directory: an encoder directory.
        device: where to put it; the CPU by default.
        dtype: precision of the weights; by default the one they were saved in.

    Raises:
        EncoderDirectoryError: if anything is missing or does not fit, naming all of it.
    """
    folder = Path(directory)
    config, transform = load_config(folder)
    with torch.device("meta"):
        encoder = SparseFormer(config, transform)
    path = folder / WEIGHTS_FILE
    weights = _load_weights(path)
    if problems := _compare(weights, encoder.state_dict()):
        raise EncoderDirectoryError(
            f"{path} does not fit {CONFIG_FILE} beside it ({len(problems)} tensors): " + "; ".join(problems)
        )
    # What is made under inference_mode does not tell when it changes, and takes no gradients ever after.
    with torch.inference_mode(False):
        # Copies, because tensors inside a mapped file are not aligned as torch aligns its own, which changes
        # the order of sums and with it the last bits of what the encoder computes.
        weights = {name: value.clone() for name, value in weights.items()}
        encoder.load_state_dict(weights, strict=True, assign=True)
        for parameter in encoder.parameters():
            parameter.requires_grad_(True)
        return encoder.to(device=device, dtype=dtype).eval()


def load_config(directory: str | PathLike[str]) -> tuple[SparseFormerConfig, TransformConfig]:
    """Read architecture and image transform of an encoder directory, without its weights.

    Raises:
        EncoderDirectoryError: if they are missing or do not fit.
    """
    folder = Path(directory)
    recover_directory(folder)
    if not folder.is_dir():
        raise EncoderDirectoryError(f"there is no encoder directory at {folder}")
    inside = folder / "encoder"
    if not (folder / CONFIG_FILE).is_file() and (inside / CONFIG_FILE).is_file():
        raise EncoderDirectoryError(f"{folder} is no encoder directory, but holds one: name {inside}")
    values = _read_json(folder / CONFIG_FILE)
    if values.get("format") != FORMAT:
        kind = values.get("model_type") or values.get("architectures") or "unknown"
        raise EncoderDirectoryError(
            f"{folder / CONFIG_FILE} does not describe a sparse_vlm encoder (format "
            f"{values.get('format')!r}, model type {kind!r}); expected a directory written by encoder.save, "
            "by the bootstrap or by sparse_vlm.convert"
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise EncoderDirectoryError(
            f"{folder / CONFIG_FILE} has format version {values.get('format_version')!r}; this sparse_vlm "
            f"reads version {FORMAT_VERSION}: update sparse_vlm"
        )
    try:
        config = SparseFormerConfig.from_dict(values.get("architecture", {}), str(folder / CONFIG_FILE))
        transform = from_preprocessor_dict(_read_json(folder / PREPROCESSOR_FILE))
    except EncoderDirectoryError:
        raise
    except (TypeError, ValueError) as error:
        raise EncoderDirectoryError(f"{folder}: {error}") from error
    return config, transform


def load_provenance(directory: str | PathLike[str]) -> dict[str, Any]:
    """Read what an encoder directory says about its origin.

    Raises:
        EncoderDirectoryError: if the file is missing or broken.
    """
    return _read_json(Path(directory) / PROVENANCE_FILE)


def _load_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise EncoderDirectoryError(f"{path} is missing; an encoder directory holds {', '.join(OWNED)}")
    try:
        return load_file(str(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise EncoderDirectoryError(
            f"{path} is not a whole safetensors file ({error}); copy the encoder directory again"
        ) from error


def _compare(weights: Mapping[str, Any], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """What differs between weights and those of an architecture, a few words a tensor."""
    problems = [
        f"missing {name} {list(wanted[name].shape)}" for name in sorted(wanted.keys() - weights.keys())
    ]
    problems += [f"extra {name} {_shape(weights[name])}" for name in sorted(weights.keys() - wanted.keys())]
    problems += [
        f"{name} is {_shape(weights[name])}, the architecture has {list(wanted[name].shape)}"
        for name in sorted(wanted.keys() & weights.keys())
        if _shape(weights[name]) != list(wanted[name].shape)
    ]
    return problems


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EncoderDirectoryError(f"{path} is missing; an encoder directory holds {', '.join(OWNED)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EncoderDirectoryError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise EncoderDirectoryError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _describe_software() -> dict[str, Any]:
    try:
        own = metadata.version("sparse-vlm")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "sparse_vlm": own,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "safetensors": safetensors.__version__,
        },
    }
