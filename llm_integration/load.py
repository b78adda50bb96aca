"""Read LLaVA directories strictly: what does not fit is an error with one clear sentence."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from . import hf as hf  # registers the tower
from .processor import count_image_tokens, load_processor


def load_llava_config(directory: str | PathLike[str]) -> LlavaConfig:
    """Read the configuration of a LLaVA directory.

    Raises:
        ValueError: if there is none, or it is of another model.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(
            f"there is no model directory at {directory} (no config.json){suggest_final(directory)}"
        )
    check_known(Path(directory))
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    if not isinstance(config, LlavaConfig):
        raise ValueError(
            f"{directory} holds a {config.model_type!r} model, expected a LLaVA: build one with "
            "python -m llm_integration.assemble"
        )
    return config


def check_known(directory: Path) -> None:
    """See that transformers knows the kind of model in a directory.

    Raises:
        ValueError: if it does not, or the model is upstream LLaVA's.
    """
    values = read_json(directory / "config.json")
    kind = values.get("model_type")
    if "mm_vision_tower" in values:
        raise ValueError(
            f"{directory} holds a {kind!r} model in the format of the llava package, which only that reads; "
            f"python -m llm_integration.from_upstream --llava {directory} --out DIR makes one in "
            "transformers' format of it"
        )
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{directory} holds a {kind!r} model, which this transformers does not know")


def suggest_final(directory: str | PathLike[str]) -> str:
    """The end of a message about a folder without a model: where a run that was meant has its result."""
    if (Path(directory) / "trainer_state.json").is_file():
        return ": it is a checkpoint, from which only its run goes on, by the command that began it"
    final = Path(directory) / "final"
    return f"; did you mean {final}?" if final.is_dir() else ""


def load_llava(
    directory: str | PathLike[str], dtype: torch.dtype | None = None, **options: Any
) -> LlavaForConditionalGeneration:
    """Load a LLaVA directory; a weight that is missing, extra or misshapen is an error.

    Args:
        directory: the model directory.
        dtype: precision; by default the checkpoint's.
        options: passed on to ``from_pretrained``.

    Raises:
        ValueError: naming the weights that do not fit.
    """
    config = load_llava_config(directory)
    check_projector(Path(directory), config)
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        str(directory), dtype=dtype or "auto", output_loading_info=True, local_files_only=True, **options
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    tower = [name for name in missing if "vision_tower" in name]
    if tower:
        raise ValueError(
            f"{directory}: the weights of the vision tower were not found ({len(tower)} tensors, first "
            f"{tower[0]}); a randomly initialised tower is of no use"
        )
    wrong = [*missing, *sorted(map(str, report["mismatched_keys"])), *sorted(report["unexpected_keys"])]
    if wrong:
        raise ValueError(
            f"{directory}: these weights are missing, extra or misshapen: {', '.join(wrong[:8])}"
        )
    return model


def check_projector(directory: Path, config: LlavaConfig) -> None:
    """Whether the tower's width fits the stored projector.

    Raises:
        ValueError: if it does not.
    """
    layers = config.vision_feature_layer
    vision: Any = config.vision_config
    width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    found = find_shape(directory, "multi_modal_projector.linear_1.weight")
    if found is not None and found[1] != width:
        raise ValueError(
            f"{directory}: the projector reads tokens of width {found[1]}, the encoder's tokens have width "
            f"{width}; assemble the model anew, or exchange the tower with python -m llm_integration.swap"
        )


def find_shape(directory: Path, ending: str) -> tuple[int, ...] | None:
    """Shape of the one stored tensor whose name ends so; None where there is none."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if name.endswith(ending):
                    return tuple(file.get_slice(name).get_shape())
    return None


def check_processor(processor: LlavaProcessor, config: LlavaConfig, source: str | PathLike[str]) -> None:
    """Whether tokenizer and image tokens are those the model was built with.

    Raises:
        ValueError: if they are not.
    """
    tokenizer: Any = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    if image_id != config.image_token_id:
        raise ValueError(
            f"{source}: wrong tokenizer: it gives {processor.image_token!r} the id {image_id}, the model "
            f"expects {config.image_token_id}; use the tokenizer that lies beside the model"
        )
    text: Any = config.text_config
    rows = text.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"{source}: wrong tokenizer: it knows {len(tokenizer)} tokens, the language model {rows}"
        )
    if count_image_tokens(processor) != config.image_seq_length:
        raise ValueError(
            f"{source}: the processor writes {count_image_tokens(processor)} image tokens for a picture, the "
            f"model's encoder makes {config.image_seq_length}"
        )


def load_checked_processor(directory: str | PathLike[str], config: LlavaConfig) -> LlavaProcessor:
    """The processor of a model directory, checked against the model's configuration."""
    processor = load_processor(directory)
    check_processor(processor, config, directory)
    return processor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values
