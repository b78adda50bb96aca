"""Exchange the vision tower of an existing LLaVA for an encoder.

``python -m llm_integration.swap --llava LLAVA_DIR --encoder ENCODER_DIR --out OUT_DIR``

The projector is kept where the encoder's provenance names, as its teacher, the very tower that is exchanged
(proved weight by weight): then the encoder's tokens live in the space that the projector already reads.
Anywhere else it starts anew and has to be aligned.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sparse_vlm import load_encoder
from sparse_vlm.checkpoint import load_provenance
from sparse_vlm.fingerprint import hash_tower

from .assemble import RUN_FILE, build_projector, check_place, save_llava, warn_of_count
from .clip_vision import is_open_clip, load_clip_vision
from .hf import build_vision_model
from .load import check_processor, load_llava_config
from .processor import build_processor, ensure_padding, pads_pictures
from .templates import IMAGE_MARK, build_template

# Where the files of a ViT, a CLIP and a LLaVA keep what transformers calls by the bare name in a tower.
_PREFIXES = ("", "vision_model.", "vision_tower.vision_model.", "vision_tower.", "model.vision_tower.")


def explain_kinship(provenance: Mapping[str, Any], tower: Mapping[str, Tensor]) -> tuple[bool, str]:
    """Whether an encoder's teacher is this very tower, and the reason in words.

    Args:
        provenance: of the encoder. Its ``teacher`` is a name, or a mapping with ``name`` (and, optionally,
            ``tower_sha256`` as :func:`sparse_vlm.fingerprint.hash_tower` computes it).
        tower: the tower's state dict.
    """
    teacher = provenance.get("teacher")
    if isinstance(teacher, Mapping):
        if teacher.get("tower_sha256") == hash_tower(tower):
            return True, "the encoder's provenance holds this tower's hash"
        teacher = teacher.get("name")
    if not isinstance(teacher, str):
        return False, "the encoder's provenance names no teacher"
    folder = find_local(teacher)
    if folder is None:
        return False, f"the encoder's teacher {teacher!r} is not on this machine, so it cannot be compared"
    try:
        same = holds_tower(folder, tower)
    except ValueError as error:
        return False, f"the encoder's teacher {teacher!r} cannot be compared with this tower: {error}"
    if same:
        return True, f"the encoder's teacher {teacher!r} has the very weights of this tower"
    return False, f"the encoder's teacher {teacher!r} has other weights than this tower"


def find_local(teacher: str) -> Path | None:
    """The folder of a transformers teacher, without touching the network; None where there is none."""
    library, colon, rest = teacher.partition(":")
    name = rest if colon and library == "hf" else teacher
    if Path(name).is_dir():
        return Path(name)
    if not (colon and library == "hf"):
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def holds_tower(folder: Path, tower: Mapping[str, Tensor]) -> bool:
    """Whether a folder holds every weight of a tower, value for value.

    Args:
        folder: in transformers' or open_clip's format.
        tower: state dict, under transformers' names.

    Raises:
        ValueError: if it is open_clip's and no plain CLIP.
    """
    read, names = _open_clip_weights(folder) if is_open_clip(folder) else _open_files(folder)
    compared = 0
    for key, value in tower.items():
        if key.endswith("position_ids"):
            continue
        name = next((prefix + key for prefix in _PREFIXES if prefix + key in names), None)
        if name is None:
            return False
        other = read(name)
        # A checkpoint stored in half precision is the same tower as its fp32 original.
        coarse = min((other.dtype, value.dtype), key=lambda dtype: torch.finfo(dtype).bits)
        if other.shape != value.shape or not torch.equal(other.to(coarse), value.cpu().to(coarse)):
            return False
        compared += 1
    return compared > 0


def _open_files(folder: Path) -> tuple[Callable[[str], Tensor], Collection[str]]:
    """How to read a weight of safetensors files by name, and the names."""
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            places.update(dict.fromkeys(file.keys(), path))

    def read(name: str) -> Tensor:
        """One weight from its file."""
        with safe_open(places[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return read, places.keys()


def _open_clip_weights(folder: Path) -> tuple[Callable[[str], Tensor], Collection[str]]:
    """The same of an open_clip directory, under transformers' names."""
    weights = load_clip_vision(folder)[0].state_dict()
    return weights.__getitem__, weights.keys()


def swap(
    llava: Path, encoder_directory: Path, out: Path, num_tokens: int | None = None, seed: int = 0
) -> str:
    """Write a copy of a LLaVA directory with another vision tower.

    Args:
        llava: an existing LLaVA directory in transformers' format.
        encoder_directory: the encoder that takes the tower's place.
        out: where to write.
        num_tokens: visual tokens per picture; by default the encoder's.
        seed: of the projector's initial weights, where it starts anew.

    Returns:
        A sentence that says what happened to the projector and why.

    Raises:
        ValueError: if something does not fit.
    """
    check_place(out, llava)
    if (llava / RUN_FILE).is_file():
        raise ValueError(
            f"{llava} is the result of a run; make a plain model of it first: "
            f"python -m llm_integration.export --run {llava} --out DIR"
        )
    load_llava_config(llava)
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        str(llava), dtype="auto", local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{llava}: {len(missing)} weights are missing ({', '.join(missing[:4])}); random ones would take "
            "their place"
        )
    stock = AutoProcessor.from_pretrained(str(llava), backend="pil", local_files_only=True)
    if stock.image_token != IMAGE_MARK:
        raise ValueError(
            f"{llava} marks pictures with {stock.image_token!r}; templates and data of this package have "
            f"{IMAGE_MARK} for it"
        )
    ensure_padding(stock.tokenizer)
    encoder = load_encoder(encoder_directory)
    provenance = load_provenance(encoder_directory)
    old_tower: Any = model.model.vision_tower
    kept, reason = explain_kinship(provenance, old_tower.state_dict())
    if kept and old_tower.config.hidden_size != encoder.config.width:
        raise ValueError(
            f"the encoder's tokens have width {encoder.config.width}, those of the tower it claims as its "
            f"teacher {old_tower.config.hidden_size}"
        )
    tower = build_vision_model(encoder, num_tokens, pooling_head=False)
    warn_of_count(encoder_directory, tower.config.num_tokens, encoder.config.num_tokens)
    old_depth = int(old_tower.config.num_hidden_layers)
    config = model.config
    layer: int | list[int] = config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    if kept and any(each in (-1, old_depth) for each in layers):
        kept = False
        reason = (
            "it reads the last state of its tower before the final norm, which no tower of ours gives out"
        )
    config.vision_config = tower.config
    drops_first = False
    if kept:
        found = [_count_from_the_end(each, old_depth, encoder.config.depth) for each in layers]
        config.vision_feature_layer = found[0] if isinstance(layer, int) else found
        drops_first = config.vision_feature_select_strategy == "default"
        if drops_first and not encoder.config.cls_token:
            raise ValueError(
                "this LLaVA drops the class token of its tower, and the encoder has none to drop"
            )
        said = f"projector kept, reading layer {config.vision_feature_layer}: {reason}"
    else:
        config.vision_feature_layer = -1
        config.vision_feature_select_strategy = "full"
        torch.manual_seed(seed)
        model.model.multi_modal_projector = build_projector(config).to(model.dtype)
        said = f"projector re-initialised, align it before use: {reason}"
    config.image_seq_length = tower.config.num_tokens - int(drops_first)
    own: Any = stock.chat_template or stock.tokenizer.chat_template
    placed: Any = tower
    model.model.vision_tower = placed.to(model.dtype)
    processor = build_processor(
        encoder.transform.config,
        stock.tokenizer,
        tower.config.num_tokens,
        build_template("own" if own else "vicuna_v1", own),
        drops_first,
        pads_pictures(stock),
    )
    facts = {
        "encoder": str(Path(encoder_directory).resolve()),
        "encoder_provenance": provenance,
        "swapped_into": str(Path(llava).resolve()),
        "num_tokens": config.image_seq_length,
        "projector": said,
    }
    check_processor(processor, config, llava)
    save_llava(model, processor, out, facts)
    return said


def _count_from_the_end(layer: int, old_depth: int, depth: int) -> int:
    """The layer that the projector reads, as the shorter tower names it.

    A cortex is the end of the ViT it was made of, so what lies as far from the end is the same.

    Args:
        layer: of the old tower: its hidden states, the first being what enters the first block.
        old_depth: blocks of the old tower.
        depth: blocks of the cortex.

    Raises:
        ValueError: if the projector reads a state that the focusing transformer has taken the place of.
    """
    place = layer if layer < 0 else layer - (old_depth + 1)
    if place < -(depth + 1):
        raise ValueError(
            f"this LLaVA reads hidden state {layer} of its tower of {old_depth} blocks; the encoder has the "
            f"last {depth} of them only, and can give states {-(depth + 1)} to -1"
        )
    return place


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llm_integration.swap", description=__doc__)
    parser.add_argument("--llava", type=Path, required=True, help="existing LLaVA directory")
    parser.add_argument("--encoder", type=Path, required=True, help="encoder directory")
    parser.add_argument("--out", type=Path, required=True, help="LLaVA directory to write")
    parser.add_argument("--num-tokens", type=int, help="visual tokens per picture (default: the encoder's)")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's initial weights")
    options = parser.parse_args(arguments)
    try:
        said = swap(options.llava, options.encoder, options.out, options.num_tokens, options.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{said}\nwrote {options.out}")


if __name__ == "__main__":
    main()
