"""What a run leaves: the trained weights, and by name and hash the model they belong to.

=======================  ==============================================================================
``run.json``             kind of result, the base model's directory, hashes of its tower and of blocks of its
                         weights, the settings
``trained.safetensors``  every trained weight (projector; language model; tower, where it was tuned)
``adapter/``             instead of that: peft's adapter, with the projector inside
the processor's files    so that the directory can be talked to as it is
=======================  ==============================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from sparse_vlm.atomic import atomic_directory
from sparse_vlm.fingerprint import hash_tensors, sample_files

from .assemble import ASSEMBLY_FILE, OWNED, RUN_FILE, check_place
from .freeze import TOWER
from .load import load_checked_processor, load_llava, load_llava_config, read_json

ADAPTER = "adapter"
FORMAT = "sparse_vlm.llava_run"
_PATTERN = "trained{suffix}.safetensors"
_WEIGHTS = "*.safetensors"


def is_result(directory: str | PathLike[str]) -> bool:
    """Whether a directory holds a run's result by reference."""
    return (Path(directory) / RUN_FILE).is_file()


def read_facts(directory: str | PathLike[str]) -> dict[str, Any] | None:
    """What is written beside a model about how it was made; None where there is no model of ours."""
    files = (Path(directory) / name for name in (RUN_FILE, ASSEMBLY_FILE))
    return next((read_json(file) for file in files if file.is_file()), None)


def base_of(directory: str | PathLike[str]) -> Path:
    """The plain LLaVA directory below a result; a plain directory is its own.

    Raises:
        ValueError: if it is not there any more.
    """
    folder = Path(directory)
    if not is_result(folder):
        return folder
    base = Path(read_json(folder / RUN_FILE)["base"])
    if not base.is_dir():
        raise ValueError(
            f"{folder} was trained on top of {base}, which is not there any more: put it back, or write "
            f'where it is now as "base" into {folder / RUN_FILE}'
        )
    return base


def save_result(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    processor: LlavaProcessor,
    out: Path,
    started_from: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write a result by reference, atomically.

    It holds everything in which the model differs from the plain one below it: what this run trained and, if
    it started from another run's result, what that one had trained.

    Args:
        model: the trained model, or peft's wrapping of it.
        tensors: its whole state dict, gathered.
        processor: its processor.
        out: where to.
        started_from: the plain LLaVA directory or the result that training started from.
        facts: settings, steps, figures.

    Raises:
        ValueError: if a trained weight is not in the state dict.
    """
    check_place(out, over="trained")
    adapter = isinstance(model, PeftModel)
    base = base_of(started_from)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": ADAPTER if adapter else "weights",
        "base": str(base.resolve()),
        "tower_sha256": hash_tensors(load_tower(base)),
        "base_sample_sha256": sample_files(base.glob("*.safetensors")),
        **facts,
    }
    with atomic_directory(out, owned=(*OWNED, ADAPTER)) as folder:
        if adapter:
            model.save_pretrained(str(folder / ADAPTER), state_dict=dict(tensors))  # type: ignore[operator]
        else:
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            lost = sorted(trained - tensors.keys())
            if lost:
                raise ValueError(f"{out}: {len(lost)} trained weights were not gathered, first {lost[0]}")
            kept = {name: tensors[name].contiguous().cpu() for name in trained}
            # From its file, not from this run's memory, where what is frozen may have been cast to bf16.
            kept.update(_read_trained(started_from, besides=trained))
            manifest["trained"] = sorted(kept)
            save_torch_state_dict(kept, folder, filename_pattern=_PATTERN, shared_tensors_to_discard=[])
        processor.save_pretrained(folder)
        text = json.dumps(manifest, indent=2, default=str) + "\n"
        (folder / RUN_FILE).write_text(text, encoding="utf-8")


def trained_before(directory: str | PathLike[str]) -> set[str]:
    """Names of the weights that a result holds; none for a plain directory, or one of adapters."""
    folder = Path(directory)
    if not is_result(folder):
        return set()
    names: set[str] = set()
    for path in folder.glob("trained*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def _read_trained(directory: Path, besides: set[str]) -> dict[str, Tensor]:
    """The weights that a result holds, but for those of some names."""
    weights: dict[str, Tensor] = {}
    if is_result(directory):
        for path in sorted(directory.glob("trained*.safetensors")):
            with safe_open(path, "pt") as file:
                weights.update({name: file.get_tensor(name) for name in file.keys() if name not in besides})  # noqa: SIM118
    return weights


def sample_weights(directory: Path) -> str:
    """A hash of blocks all over the weights of a model: a plain directory's, or a result's and its base's."""
    return sample_files({path for place in (base_of(directory), directory) for path in place.glob(_WEIGHTS)})


def load_tower(base: Path) -> dict[str, Tensor]:
    """The stored weights of a LLaVA directory's tower, under the tower's own names."""
    weights: dict[str, Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if f"{TOWER}." in name:
                    weights[name.rpartition(f"{TOWER}.")[2]] = file.get_tensor(name)
    return weights


def load_model(
    directory: str | PathLike[str], dtype: torch.dtype | None = None, merge: bool = True
) -> LlavaForConditionalGeneration:
    """Load a plain LLaVA directory, or a run's result on top of its base.

    Args:
        directory: either.
        dtype: precision; by default the checkpoint's.
        merge: fold adapters into the weights. With False a result that has adapters is refused.

    Raises:
        ValueError: if something does not fit, above all a tower other than the one trained with.
    """
    folder = Path(directory)
    if not is_result(folder):
        return load_llava(folder, dtype)
    manifest = read_json(folder / RUN_FILE)
    base = base_of(folder)
    if hash_tensors(load_tower(base)) != manifest["tower_sha256"]:
        raise ValueError(
            f"the tower in {base} is not the one that {folder} was trained with: their hashes differ"
        )
    sampled = manifest.get("base_sample_sha256")  # results of before it was written have none
    if sampled is not None and sample_files(base.glob("*.safetensors")) != sampled:
        raise ValueError(
            f"{base} is not the model that {folder} was trained on top of: its weights have changed since"
        )
    model = load_llava(base, dtype)
    if manifest["kind"] == ADAPTER:
        if not merge:
            raise ValueError(
                f"{folder} holds adapters; make a plain model of it before it is trained again: "
                f"python -m llm_integration.export --run {folder} --out DIR"
            )
        merged: Any = PeftModel.from_pretrained(model, str(folder / ADAPTER)).merge_and_unload()
        return merged
    there = trained_before(folder)
    lost = sorted(set(manifest.get("trained", there)) - there)
    if lost or not there:
        first = f"; {len(lost)} are missing, the first {lost[0]}" if lost else ""
        raise ValueError(f"{folder} does not hold the weights that its run trained{first}")
    for path in sorted(folder.glob("trained*.safetensors")):
        apply_weights(model, load_state_dict_from_file(path), path)
    return model


def apply_weights(model: nn.Module, weights: Mapping[str, Any], source: Path) -> None:
    """Write weights into a model by name, partitioned (ZeRO-3) or not.

    Raises:
        ValueError: for a name or a shape that the model does not have.
    """
    for name, value in weights.items():
        try:
            parameter = model.get_parameter(name)
        except AttributeError:
            raise ValueError(f"{source} holds {name}, which the model does not have") from None
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if shape != tuple(value.shape):
            raise ValueError(f"{source}: {name} is {tuple(value.shape)}, the model has {shape}")
        with gathered([parameter]), torch.no_grad():
            parameter.copy_(value)


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Whole parameters inside the block, also where ZeRO-3 has partitioned them."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed import zero

    # Every process writes the same values, so each may keep what it wrote.
    return zero.GatheredParameters(parameters, modifier_rank=0)


def load_model_processor(directory: str | PathLike[str]) -> LlavaProcessor:
    """The processor of a plain LLaVA directory or of a result, checked against the model."""
    return load_checked_processor(directory, load_llava_config(base_of(directory)))
