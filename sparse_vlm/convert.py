"""Official SparseFormer checkpoints, turned into encoder directories.

``python -m sparse_vlm.convert OFFICIAL.pth OUT_DIR [--preset NAME]``

The checkpoints published with `showlab/sparseformer` carry three generations of names. The two older ones are
first renamed to the newest (:data:`OLDER_NAMES`), whose names then become ours (:data:`WHOLE_NAMES`,
:data:`UNIT_NAMES`). Nothing is left over in either direction, or the conversion is refused.

The official package computes the same function as the encoder that is written. Its oldest training code
differs from it in four constants (epsilons of the stem's norm, the generator's norm and the point spread, and
an unbiased variance), for the same weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import SparseFormerConfig
from .encoder import SparseFormer
from .fingerprint import hash_file
from .presets import PRESETS, load_preset

# Newest official name -> ours, outside the units. A name stands for its weight and bias.
WHOLE_NAMES: dict[str, str] = {
    "feat_extractor.conv1": "stem.conv",
    "initial_roi.weight": "focusing.initial_rois",
    "initial_embedding.weight": "focusing.token_embedding",
    "layers.0.stage_embedding.weight": "focusing.stage_embedding",
    "layers.1.0": "focusing.lift",
    "layers.1.1": "focusing.lift_norm",
    "cls_embedding.weight": "cortex.cls_token",
    "norm": "head.norm",
    "proj": "head.proj",
}

# The same inside a unit. `layers.0` is the repeated unit (our `focusing.stage`), `layers.1` the linear map
# between the widths, `layers.2` the first unit at full width (our `focusing.handover`), and the others are
# the blocks of the cortex.
UNIT_NAMES: dict[str, str] = {
    "roi_offset_module.0": "offset_norm",
    "roi_offset_module.1": "offset",
    "roi_offset_bias": "offset_bias",
    "adaptive_mixing.parameter_generator.0": "mixing.norm",
    "adaptive_mixing.parameter_generator.1": "mixing.generator_in",
    "adaptive_mixing.parameter_generator.2": "mixing.generator_out",
    "adaptive_mixing.m_beta": "mixing.channel_bias",
    "adaptive_mixing.s_beta": "mixing.point_bias",
    "adaptive_mixing.out_proj": "mixing.out",
    "pe_transition.0": "position_norm",
    "pe_transition.1": "position",
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "roi_adjust_module.0": "adjust_norm",
}
# What the last layers of the RoI adjustment are called depends on whether it has a hidden layer.
ADJUST_NAMES: dict[bool, dict[str, str]] = {
    False: {"roi_adjust_module.1": "adjust"},
    True: {"roi_adjust_module.1": "adjust_hidden", "roi_adjust_module.3": "adjust"},
}

# Older official name -> newest, as parts of a name; the first that occurs in a name is applied.
OLDER_NAMES: dict[str, str] = {
    "token_roi.": "initial_roi.",
    "token_embedding.": "initial_embedding.",
    "global_embedding.": "cls_embedding.",
    "head.norm.": "norm.",
    "head.classifier.": "proj.",
    "ln_post.": "norm.",
    "cls_head.": "proj.",
    ".tuo_proj.": ".out_proj.",
    ".ln_attn.": ".norm1.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".ffn.0.": ".norm2.",
    ".ffn.1.": ".mlp.fc1.",
    ".ffn.3.": ".mlp.fc2.",
}
# The class token's RoI, in the first bootstrapped checkpoints: the class token samples nothing.
UNUSED_NAMES = ("global_roi.weight",)

_STYLES = {
    "initial_roi.weight": "the refactored package's names",
    "token_roi.weight": "the names of the v1 training code",
    "token_roi_cc.weight": "the names of the first bootstrapping code",
}


class ConversionError(ValueError):
    """A checkpoint that cannot become an encoder, with everything that does not fit."""


def name_table(config: SparseFormerConfig) -> dict[str, str]:
    """Newest official name of every tensor of an architecture, to ours."""
    return {_official_name(name, config): name for name in _build_on_meta(config).state_dict()}


def convert_state_dict(state_dict: Mapping[str, Tensor], config: SparseFormerConfig) -> dict[str, Tensor]:
    """Rename an official state dict of any style to ours, in fp32.

    Args:
        state_dict: the official tensors by name.
        config: the architecture they belong to.

    Raises:
        ConversionError: listing every missing, extra and misshapen tensor by its newest official name.
    """
    renamed = rename_older(state_dict)
    problems = _compare(renamed, config)
    if problems:
        raise ConversionError(
            f"the checkpoint does not fit the architecture ({len(problems)} tensors): " + "; ".join(problems)
        )
    wanted = _build_on_meta(config).state_dict()
    return {
        ours: renamed[official].detach().float().reshape(wanted[ours].shape).contiguous()
        for official, ours in name_table(config).items()
    }


def rename_older(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring an official state dict of any style to the newest official names.

    Raises:
        ConversionError: if two tensors end up with one name.
    """
    units = {name.split(".")[1] for name in state_dict if name.startswith("layers.")}
    first_block = 1 + max((int(unit) for unit in units if unit.isdigit()), default=-1)
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        new = _rename_older_name(name, first_block)
        if new is None:
            continue
        if new in renamed:
            raise ConversionError(f"the checkpoint holds {new} twice, once of them as {name}")
        renamed[new] = value
    # Centre and size, where later generations store two corners.
    centre, size = renamed.get("token_roi_cc.weight"), renamed.get("token_roi_wh.weight")
    if centre is not None and size is not None and centre.shape == size.shape:
        del renamed["token_roi_cc.weight"], renamed["token_roi_wh.weight"]
        corners = (centre - 0.5 * size, centre + 0.5 * size)
        renamed["initial_roi.weight"] = torch.cat(corners, dim=-1)  # (N, 4)
    return renamed


def guess_preset(state_dict: Mapping[str, Tensor]) -> tuple[str, SparseFormerConfig]:
    """The published model whose shapes a state dict has; its token count is read off the state dict.

    Raises:
        ConversionError: if none fits, listing what differs from the nearest.
    """
    renamed = rename_older(state_dict)
    configs = {name: _with_count_of(renamed, load_preset(name)[0]) for name in PRESETS}
    problems = {name: _compare(renamed, config) for name, config in configs.items()}
    name = min(problems, key=lambda candidate: len(problems[candidate]))
    if problems[name]:
        raise ConversionError(
            f"the checkpoint has the shapes of no published SparseFormer; {len(problems[name])} tensors "
            f"differ from the nearest, {name}: " + "; ".join(problems[name])
        )
    return name, configs[name]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an official checkpoint file, without running code from it.

    Raises:
        ConversionError: if the file is missing, broken, holds more than tensors, or is no SparseFormer.
    """
    if not path.is_file():
        raise ConversionError(f"there is no checkpoint file at {path}")
    try:
        loaded: Any = torch.load(str(path), map_location="cpu", weights_only=True)
    # A broken file sends the unpickler anywhere: KeyError, IndexError, struct.error.
    except Exception as error:
        raise ConversionError(
            f"{path} cannot be read as tensors alone ({_explain(path, error)}). If it is whole and you trust "
            "it, save the state dict that it holds under 'model' or 'state_dict' to a file of its own"
        ) from error
    for key in ("model", "state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{path} holds no state dict but a {type(loaded).__name__}")
    others = sorted(str(name) for name, value in loaded.items() if not isinstance(value, Tensor))
    if others:
        raise ConversionError(f"{path} holds entries that are no tensors: {', '.join(others[:8])}")
    tensors = {str(name).removeprefix("module."): value for name, value in loaded.items()}
    if not any(name in tensors for name in _STYLES):
        raise ConversionError(
            f"{path} is not an official SparseFormer checkpoint: none of {', '.join(_STYLES)} is in it"
        )
    return tensors


def _explain(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch cannot read, in a few words."""
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    if start.startswith(b"<"):
        return "it is a web page"
    lines = str(error).strip().splitlines()
    # torch begins with a paragraph about its own options; what it found comes later.
    said = next((line for line in lines if "WeightsUnpickler error" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {said.strip()}".rstrip(": ")


def convert(checkpoint: Path, directory: Path, preset: str | None = None) -> tuple[str, SparseFormer]:
    """Convert a checkpoint file into an encoder directory.

    Args:
        checkpoint: the official file.
        directory: where the encoder directory goes.
        preset: the published model it is; guessed from the shapes if not given.

    Returns:
        The preset's name and the encoder.

    Raises:
        ConversionError: if the file cannot be read or does not fit.
        ValueError: for an unknown preset.
    """
    tensors = read_checkpoint(checkpoint)
    try:
        if preset is None:
            preset, config = guess_preset(tensors)
        else:
            config = _with_count_of(rename_older(tensors), load_preset(preset)[0])
        weights = convert_state_dict(tensors, config)
    except ConversionError as error:
        raise ConversionError(f"{checkpoint}: {error}") from None
    with torch.device("meta"):
        encoder = SparseFormer(config, load_preset(preset)[1])
    encoder.load_state_dict(weights, strict=True, assign=True)
    encoder.save(
        directory,
        provenance={
            "made_by": "sparse_vlm.convert",
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": hash_file(checkpoint),
            "checkpoint_names": next(words for name, words in _STYLES.items() if name in tensors),
            "preset": preset,
        },
    )
    return preset, encoder.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_vlm.convert",
        description="Turn an official SparseFormer checkpoint into an encoder directory.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="OFFICIAL.pth", help="the published file")
    parser.add_argument("directory", type=Path, metavar="OUT_DIR", help="the encoder directory to write")
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"which model it is, if shapes shall not decide: {', '.join(PRESETS)}",
    )
    options = parser.parse_args(arguments)
    try:
        preset, encoder = convert(options.checkpoint, options.directory, options.preset)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    print(
        f"{options.directory}: {preset}, {len(encoder.state_dict())} tensors, {parameters / 1e6:.1f} M "
        f"parameters, {encoder.num_tokens} tokens"
    )
    return 0


def _official_name(name: str, config: SparseFormerConfig) -> str:
    units = {"focusing.stage": "layers.0", "focusing.handover": "layers.2"}
    units.update({f"cortex.blocks.{index}": f"layers.{index + 3}" for index in range(config.depth)})
    for official, ours in WHOLE_NAMES.items():
        if name == ours or name.startswith(f"{ours}."):
            return official + name[len(ours) :]
    for ours_unit, official_unit in units.items():
        if name.startswith(f"{ours_unit}."):
            inner = name[len(ours_unit) + 1 :]
            for official, ours in {**UNIT_NAMES, **ADJUST_NAMES[config.adjust_hidden]}.items():
                if inner == ours or inner.startswith(f"{ours}."):
                    return f"{official_unit}.{official}{inner[len(ours) :]}"
    raise ConversionError(f"official SparseFormers have nothing like {name}; this architecture is not theirs")


def _rename_older_name(name: str, first_block: int) -> str | None:
    if name in UNUSED_NAMES:
        return None
    if name == "stage_embedding.weight":
        return "layers.0.stage_embedding.weight"
    if name.startswith("blocks."):
        index, _, inner = name[len("blocks.") :].partition(".")
        if index.isdigit():
            name = f"layers.{first_block + int(index)}.{inner}"
    for older, newer in OLDER_NAMES.items():
        if older in name:
            return name.replace(older, newer, 1)
    return name


def _compare(renamed: Mapping[str, Tensor], config: SparseFormerConfig) -> list[str]:
    wanted = _build_on_meta(config).state_dict()
    table = name_table(config)
    shapes = {official: _official_shape(ours, wanted[ours]) for official, ours in table.items()}
    missing = [f"missing {name} {shapes[name]}" for name in shapes if name not in renamed]
    extra = [f"extra {name} {list(renamed[name].shape)}" for name in sorted(renamed) if name not in shapes]
    misshapen = [
        f"{name} is {list(renamed[name].shape)}, the architecture has {shape}"
        for name, shape in shapes.items()
        if name in renamed and list(renamed[name].shape) != shape
    ]
    return missing + extra + misshapen


def _official_shape(ours: str, value: Tensor) -> list[int]:
    if ours == "cortex.cls_token":
        return [1, value.shape[-1]]
    if ours.endswith(".offset_bias"):
        return [value.numel()]
    return list(value.shape)


def _with_count_of(renamed: Mapping[str, Tensor], config: SparseFormerConfig) -> SparseFormerConfig:
    rois = renamed.get("initial_roi.weight")
    if rois is None or rois.ndim != 2 or rois.shape[0] < 1:
        return config
    return config.replace(num_latents=rois.shape[0])


def _build_on_meta(config: SparseFormerConfig) -> SparseFormer:
    with torch.device("meta"):
        return SparseFormer(config)


if __name__ == "__main__":
    sys.exit(main())
