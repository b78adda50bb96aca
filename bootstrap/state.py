"""Checkpoints of a run: everything that decides what comes next, without pickle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_vlm.atomic import atomic_directory, write_atomic
from sparse_vlm.checkpoint import WEIGHTS_FILE, load_encoder, save_encoder
from sparse_vlm.encoder import SparseFormer

from .data import PictureStream
from .distributed import TorchEngine
from .optim import WeightAverage, averaged
from .student import Spreads

_NAME = re.compile(r"step_(\d{8})")
# An encoder directory inside a checkpoint; older ones have the weights alone, in a file of this name.
_ENCODER, _BARE_WEIGHTS = "encoder", "encoder.safetensors"
# The weights in training, where the encoder directory has their average.
_TRAINED = "trained.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name))


def save_state(
    folder: Path,
    step: int,
    encoder: SparseFormer,
    engine: TorchEngine,
    stream: PictureStream,
    average: WeightAverage | None,
    spreads: Spreads,
    keep: int,
    teacher_hash: str,
) -> Path | None:
    """Write a checkpoint atomically and delete all but the newest ``keep``; called on every process.

    Its encoder directory is what is evaluated at this step: of the averaged weights, if there are such.

    Returns:
        Where it is, on the main process.
    """
    streams = engine.gather(stream.state_dict())
    generators = engine.gather(_random_state())
    if not engine.keeps_optimiser:
        # DeepSpeed's processes write side by side; until state.json is there too, nobody reads them.
        engine.save_shards(folder / f"shards_{step:08d}")
    engine.gather(None)
    if not engine.is_main:
        return None
    path = folder / f"step_{step:08d}"
    with atomic_directory(path) as target:
        made = {"made_by": "bootstrap.train, at a checkpoint", "steps": step, "teacher_sha256": teacher_hash}
        with averaged(encoder, average):
            save_encoder(encoder, target / _ENCODER, made)
        save_file(_on_cpu(spreads._asdict()), str(target / "spreads.safetensors"))
        if engine.keeps_optimiser and engine.optimiser is not None:
            save_file(_optimiser_state(encoder, engine.optimiser), str(target / "optimiser.safetensors"))
        if average is not None:
            save_file(_on_cpu(average.shadow), str(target / "average.safetensors"))
            trained = {name: value for name, value in encoder.state_dict().items() if name in average.shadow}
            save_file(_on_cpu(trained), str(target / _TRAINED))
        for rank, tensors in enumerate(generators):
            save_file(tensors, str(target / f"random_{rank}.safetensors"))
        state = {
            "step": step,
            "streams": streams,
            "average_updates": average.updates if average is not None else 0,
            "encoder_is_averaged": average is not None,
            "teacher_sha256": teacher_hash,
        }
        (target / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
        shutil.rmtree(folder / old.name.replace("step_", "shards_"), ignore_errors=True)
    return path


def load_state(
    path: Path,
    encoder: SparseFormer,
    engine: TorchEngine,
    stream: PictureStream,
    average: WeightAverage | None,
    teacher_hash: str,
) -> int:
    """Put everything back as it was; returns the step.

    Raises:
        ValueError: if the checkpoint was written by another number of processes, beside another teacher, is
            damaged, or does not fit.
    """
    state = _read_state(path)
    if state.get("teacher_sha256", teacher_hash) != teacher_hash:
        raise ValueError(
            f"{path} was written beside a teacher with other weights than teacher.name has now: give it back "
            "its own, or start a new run"
        )
    if len(state["streams"]) != engine.world_size:
        raise ValueError(_describe_processes(path, len(state["streams"]), engine.world_size))
    bare = path / _BARE_WEIGHTS
    weights = _read_tensors(bare if bare.is_file() else path / _ENCODER / WEIGHTS_FILE, path)
    if state.get("encoder_is_averaged"):
        weights |= _read_tensors(path / _TRAINED, path)
    encoder.load_state_dict(weights, strict=True)
    if engine.keeps_optimiser and engine.optimiser is not None:
        _restore_optimiser(encoder, engine.optimiser, _read_tensors(path / "optimiser.safetensors", path))
    else:
        engine.load_shards(path.parent / path.name.replace("step_", "shards_"))
    if average is not None:
        average.shadow = {
            name: value.to(encoder.device)
            for name, value in _read_tensors(path / "average.safetensors", path).items()
        }
        average.updates = int(state["average_updates"])
    stream.load_state_dict(state["streams"][engine.rank])
    _restore_random(_read_tensors(path / f"random_{engine.rank}.safetensors", path))
    return int(state["step"])


def load_spreads(path: Path) -> Spreads:
    """The units of the squared distances that a run began with."""
    return Spreads(**_read_tensors(path / "spreads.safetensors", path))


def load_resumed_encoder(path: Path) -> SparseFormer | None:
    """The encoder of a checkpoint in fp32; None of an older one, which has its weights alone.

    Raises:
        ValueError: if it is damaged.
    """
    if not (path / _ENCODER).is_dir():
        return None
    try:
        return load_encoder(path / _ENCODER, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _damaged(path / _ENCODER, path, error) from error


def _describe_processes(path: Path, theirs: int, ours: int) -> str:
    said = f"{path} was written by {theirs} processes, this run has {ours}: start as many"
    if not (path / _ENCODER).is_dir():
        return said + ", or start anew in another directory"
    return said + (
        f", or begin another run from its weights with out=… student.start_from={path / _ENCODER} "
        "student.architecture={}"
    )


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = dict(json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path / "state.json", path, error) from error
    return state


def _read_tensors(file: Path, checkpoint: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise _damaged(file, checkpoint, error) from error


def _damaged(file: Path, checkpoint: Path, error: Exception) -> ValueError:
    """A file of a checkpoint that cannot be read, and what to do."""
    what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
    older = [path for path in list_checkpoints(checkpoint.parent) if path.name < checkpoint.name]
    then = f"go on from {older[-1].name}" if older else "begin at the first step"
    return ValueError(f"{file} is {what}: delete {checkpoint} to {then} with the same command")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, json.dumps(values, indent=2) + "\n")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _named_states(encoder: SparseFormer, optimiser: torch.optim.Optimizer) -> list[tuple[str, Any]]:
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    return [(names[p], p) for group in optimiser.param_groups for p in group["params"]]


def _optimiser_state(encoder: SparseFormer, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}/{name}": value.detach().cpu().contiguous()
        for name, parameter in _named_states(encoder, optimiser)
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _restore_optimiser(
    encoder: SparseFormer, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(_named_states(encoder, optimiser))
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        if name not in parameters:
            raise ValueError(
                f"the checkpoint has optimiser state for {name!r}, which this run does not train"
            )
        # Moments lie beside their parameter; a step counter too if AdamW is fused, else on the CPU.
        beside = kind != "step" or optimiser.defaults.get("fused")
        device = parameters[name].device if beside else "cpu"
        optimiser.state[parameters[name]][kind] = value.to(device)


def _random_state() -> dict[str, Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def _restore_random(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
