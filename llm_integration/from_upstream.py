"""Make a LLaVA in transformers' format of one that the ``llava`` package has trained.

``python -m llm_integration.from_upstream --llava CHECKPOINT --out OUT_DIR``

Its tower is an encoder directory (docs/llava.md) or a CLIP; of a run that trained the projector alone, the
language model is named with ``--llm``. What comes out answers as the original does, weight for weight: chat,
training, evaluation and servers of transformers' format read it.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer, GenerationConfig

from sparse_vlm import load_encoder

from .assemble import DTYPES, Tower, check_place, join_parts, load_llm, save_llava
from .clip_vision import count_patches, load_clip_vision
from .hf import build_vision_model
from .llava.directories import check_fingerprint, find_encoder, is_encoder
from .load import read_json
from .swap import find_local
from .templates import space_pictures

LLM_KINDS: Mapping[str, str] = MappingProxyType(
    {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
)
"""Of what kind the language model of a checkpoint is, by the checkpoint's ``model_type``."""

# ChatML as LLaVA writes it: nothing between turns, and a sentence of the system's before them.
_CHATML = """\
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nSYSTEM<|im_end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

CONVERSATIONS: Mapping[str, str | None] = MappingProxyType(
    {
        "vicuna_v1": None,
        "chatml_direct": _CHATML.replace("SYSTEM", "Answer the questions."),
        "mpt": _CHATML.replace(
            "SYSTEM",
            "A conversation between a user and an LLM-based AI assistant. "
            "The assistant gives helpful and honest answers.",
        ),
        "own": None,
    }
)
"""What a checkpoint may have been tuned with, by LLaVA's name: a Jinja text where there is none in
:mod:`llm_integration.templates`; and the tokenizer's own."""

PROJECTOR_FILE = "mm_projector.bin"
# What LLaVA adds to a language model's configuration, beside everything that begins with mm_.
_NOT_THE_LLMS = (
    *("architectures", "model_type", "_name_or_path", "auto_map", "transformers_version", "use_mm_proj"),
    *("image_aspect_ratio", "image_grid_pinpoints", "image_crop_resolution", "image_split_resolution"),
    *("freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "tune_mm_vision_resampler", "unfreeze_mm_vision_tower"),
    *("tokenizer_padding_side", "tokenizer_model_max_length", "pretrain_mm_mlp_adapter", "vision_tower"),
)
_PROJECTOR = re.compile(r"(?:^|\.)mm_projector\.([02])\.(weight|bias)$")
_LAYERS = {"0": "linear_1", "2": "linear_2"}
_CLIP = re.compile(r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)$")


def read_checkpoint_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of a checkpoint of the llava package that this module can convert.

    Raises:
        ValueError: if it is none, or one that transformers' LLaVA cannot be.
    """
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"there is no checkpoint at {checkpoint} (no config.json)")
    if (checkpoint / "adapter_config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds adapters on top of another model: merge them first, with LLaVA's own "
            "scripts/merge_lora_weights.py (docs/llava.md)"
        )
    values = read_json(checkpoint / "config.json")
    if "mm_vision_tower" not in values:
        raise ValueError(
            f"{checkpoint} holds a {values.get('model_type')!r} model that the llava package has not trained "
            '(no "mm_vision_tower" in its config.json)'
        )
    if values.get("model_type") not in LLM_KINDS:
        raise ValueError(
            f"{checkpoint} holds a {values.get('model_type')!r} model; what can be converted is "
            f"{', '.join(LLM_KINDS)}"
        )
    kind = values.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise ValueError(
            f"{checkpoint} has a projector of type {kind!r}; transformers' LLaVA has mlp2x_gelu only"
        )
    if values.get("mm_use_im_start_end"):
        raise ValueError(
            f"{checkpoint} was trained with marks before and after each picture (mm_use_im_start_end), which "
            "no template of transformers' LLaVA writes"
        )
    aspect = values.get("image_aspect_ratio")
    if aspect not in (None, "square", "pad"):
        raise ValueError(
            f"{checkpoint} cuts pictures into tiles (image_aspect_ratio {aspect!r}), which LLaVA in "
            "transformers' format does not"
        )
    return values


def find_tower(checkpoint: Path, values: Mapping[str, Any], given: Path | None = None) -> tuple[Path, bool]:
    """Where the tower of a checkpoint lies, and whether it is an encoder directory.

    Args:
        checkpoint: the checkpoint.
        values: its configuration.
        given: where the user says that it lies.

    Raises:
        FileNotFoundError: if it is not on this machine.
        ValueError: if an encoder has other weights than the checkpoint was trained with, or what the user
            names is none.
    """
    name = str(given or values["mm_vision_tower"])
    sha256 = values.get("mm_vision_tower_sha256")
    facts = SimpleNamespace(mm_vision_tower_sha256=sha256, _name_or_path=str(checkpoint))
    if given is not None and sha256 is not None and not is_encoder(given):
        raise ValueError(f"{checkpoint} was trained with an encoder directory, and {given} is none")
    encoder = find_encoder(name, facts)
    if encoder is not None:
        check_fingerprint(encoder, facts)
        return encoder, True
    found = Path(name) if Path(name).is_dir() else find_local(f"hf:{name}")
    if found is None:
        raise FileNotFoundError(
            f"the vision tower {name} of {checkpoint} is not on this machine: name its folder with "
            "--vision-tower"
        )
    return found, False


def build_tower(directory: Path, sparse: bool, values: Mapping[str, Any]) -> Tower:
    """The tower of a checkpoint, read as the llava package reads it.

    Args:
        directory: of the tower.
        sparse: whether it is an encoder directory.
        values: the checkpoint's configuration.

    Raises:
        ValueError: for a layer that it does not have.
    """
    patches_only = values.get("mm_vision_select_feature", "patch") == "patch"
    layer = int(values.get("mm_vision_select_layer", -1 if sparse else -2))
    model: Any
    if sparse:
        encoder = load_encoder(directory)
        model = build_vision_model(encoder, pooling_head=False)
        tokens, depth = model.config.num_tokens, encoder.config.depth
        drops_first, transform = patches_only and encoder.config.cls_token, encoder.transform.config
    else:
        model, transform = load_clip_vision(directory)
        tokens, depth = count_patches(model) + 1, model.config.num_hidden_layers
        drops_first = patches_only
    if not -(depth + 1) <= layer <= depth:
        raise ValueError(f"mm_vision_select_layer {layer}: the tower in {directory} has {depth} blocks")
    # From the end: transformers takes the index 0 for "none".
    layer = layer if layer < 0 else layer - (depth + 1)
    return Tower(model, tokens, layer, drops_first, transform)


def list_weights(checkpoint: Path) -> list[Path]:
    """Files of a checkpoint's weights, a projector alone left out."""
    return sorted(checkpoint.glob("model*.safetensors")) or sorted(checkpoint.glob("pytorch_model*.bin"))


def read_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """All weights of a checkpoint, file by file, without running any code that files bring.

    Raises:
        ValueError: if there are none.
    """
    files = list_weights(checkpoint)
    if not files:
        raise ValueError(f"{checkpoint} holds no weights (model*.safetensors or pytorch_model*.bin)")
    for file in files:
        yield from read_file(file).items()


def read_file(file: Path) -> dict[str, Tensor]:
    """The weights in a file.

    Raises:
        ValueError: if it holds none: part of a download, say, or what Git LFS keeps in its place.
    """
    try:
        if file.suffix == ".bin":
            mapped = zipfile.is_zipfile(file)  # files of before torch 1.6 cannot be
            return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))
        return load_file(file)
    except (SafetensorError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"{file} is damaged, or holds no weights ({said})") from error


def split_weights(
    weights: Iterator[tuple[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a checkpoint under transformers' names: language model, projector, CLIP tower."""
    llm: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    clip: dict[str, Tensor] = {}
    for name, tensor in weights:
        if found := _PROJECTOR.search(name):
            projector[f"{_LAYERS[found[1]]}.{found[2]}"] = tensor
        elif found := _CLIP.match(name):
            clip[found[1]] = tensor
        elif not name.startswith("model.vision_tower.") and not name.endswith("rotary_emb.inv_freq"):
            llm[name] = tensor
    return llm, projector, clip


def load_language(
    checkpoint: Path, values: Mapping[str, Any], weights: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[Any, Any]:
    """The language model inside a checkpoint, and its tokenizer.

    Args:
        checkpoint: the checkpoint.
        values: its configuration.
        weights: the language model's.
        dtype: precision; None keeps the checkpoint's.

    Raises:
        ValueError: if a weight is missing, extra or misshapen.
    """
    own = {
        key: value
        for key, value in values.items()
        if key not in _NOT_THE_LLMS and not key.startswith("mm_") and key not in ("torch_dtype", "dtype")
    }
    config = CONFIG_MAPPING[LLM_KINDS[values["model_type"]]].from_dict(own)
    dtype = dtype or next(iter(weights.values())).dtype
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    llm, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
    )
    wrong = sorted(
        {*map(str, report["missing_keys"]), *report["unexpected_keys"], *map(str, report["mismatched_keys"])}
    )
    if wrong:
        raise ValueError(
            f"{checkpoint}: these weights of the language model are missing, extra or misshapen: "
            f"{', '.join(wrong[:8])}"
        )
    if (checkpoint / "generation_config.json").is_file():
        llm.generation_config = GenerationConfig.from_pretrained(str(checkpoint), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), config=config, local_files_only=True)
    return llm.eval(), tokenizer


def from_upstream(
    checkpoint: Path,
    out: Path,
    template: str = "vicuna_v1",
    vision_tower: Path | None = None,
    llm_name: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LLaVA directory in transformers' format that answers as a checkpoint of the llava package does.

    Args:
        checkpoint: the output directory of ``llava.train.train``, or a published model in its format.
        out: where to write.
        template: the conversation format it was tuned with, a key of :data:`CONVERSATIONS`.
        vision_tower: where its tower lies, if no longer where its configuration says.
        llm_name: the language model of a run that trained the projector alone; otherwise None.
        dtype: precision of the whole; by default the language model's.

    Raises:
        ValueError: if something is missing or does not fit.
        FileNotFoundError: if the tower is not there.
    """
    check_place(out, checkpoint)
    values = read_checkpoint_config(checkpoint)
    directory, sparse = find_tower(checkpoint, values, vision_tower)
    tower = build_tower(directory, sparse, values)
    # There may be a projector's file beside the whole weights, which hold it too: LLaVA reads those.
    whole, alone = bool(list_weights(checkpoint)), checkpoint / PROJECTOR_FILE
    if whole and llm_name is not None:
        raise ValueError(f"{checkpoint} brings its own language model: leave out --llm {llm_name}")
    if not whole and alone.is_file() and llm_name is None:
        raise ValueError(
            f"{checkpoint} holds a projector alone ({PROJECTOR_FILE}): name its language model with --llm"
        )
    if llm_name is not None and alone.is_file():
        _, projector, clip = split_weights(iter(read_file(alone).items()))
        llm, tokenizer = load_llm(llm_name, dtype)
    else:
        language, projector, clip = split_weights(read_weights(checkpoint))
        llm, tokenizer = load_language(checkpoint, values, language, dtype)
    # LLaVA reads a CLIP from the folder that the configuration names, unless the tower was tuned, too.
    if clip and not sparse and values.get("unfreeze_mm_vision_tower"):
        _fill(tower.model, clip, checkpoint, "tower")
    pads = values.get("image_aspect_ratio") == "pad"
    if CONVERSATIONS.get(template) is not None:
        tokenizer.chat_template, template = CONVERSATIONS[template], "own"
    model, processor = join_parts(tower, llm, tokenizer, template, pads)
    _fill(model.model.multi_modal_projector, projector, checkpoint, "projector")
    # LLaVA tokenises what stands behind a picture by itself, where SentencePiece begins with a space.
    if llm_name is None and tokenizer.tokenize("\n")[0].startswith("\N{LOWER ONE EIGHTH BLOCK}"):
        processor.chat_template = space_pictures(str(processor.chat_template))
    facts = {
        "converted_from": str(checkpoint.resolve()),
        "vision_tower": str(directory.resolve()),
        "llm": llm_name or "the checkpoint's",
        "num_tokens": model.config.image_seq_length,
        "projector": "the checkpoint's",
    }
    save_llava(model, processor, out, facts)


def _fill(part: Any, weights: Mapping[str, Tensor], checkpoint: Path, name: str) -> None:
    """Put a checkpoint's weights into a part of a LLaVA, all of them and no others."""
    wanted = part.state_dict()
    wrong = sorted(
        key
        for key in {*wanted, *weights}
        if key not in weights or key not in wanted or weights[key].shape != wanted[key].shape
    )
    if wrong:
        raise ValueError(
            f"{checkpoint}: these weights of the {name} are missing, extra, or of another shape than tower "
            f"and language model ask for: {', '.join(wrong[:8])}"
        )
    part.load_state_dict(dict(weights), strict=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llm_integration.from_upstream", description=__doc__)
    parser.add_argument("--llava", type=Path, required=True, help="checkpoint of the llava package")
    parser.add_argument("--out", type=Path, required=True, help="LLaVA directory to write")
    parser.add_argument(
        "--template",
        choices=list(CONVERSATIONS),
        default="vicuna_v1",
        help="conversation format it was tuned with, LLaVA's --conv-mode (default: vicuna_v1)",
    )
    parser.add_argument(
        "--vision-tower", type=Path, help="folder of its tower (default: as in its config.json)"
    )
    parser.add_argument("--llm", help="language model (directory, or hf:NAME) of a projector trained alone")
    parser.add_argument("--dtype", choices=list(DTYPES), help="precision (default: the language model's)")
    options = parser.parse_args(arguments)
    try:
        from_upstream(
            options.llava,
            options.out,
            options.template,
            options.vision_tower,
            options.llm,
            DTYPES[options.dtype] if options.dtype else None,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {options.out}; python -m llm_integration.chat --model {options.out}")


if __name__ == "__main__":
    main()
