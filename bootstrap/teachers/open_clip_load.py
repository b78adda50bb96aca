"""Loading open_clip's models: by name with a checkpoint file, from a folder, or a downloaded tag."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import get_model_config
from torch import Tensor

from .files import describe_misfit, find_weights, read_json
from .open_clip_vit import build_open_clip_trunk
from .spec import TeacherError
from .trunk import Trunk

_WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)


_PREPARATION = ("mean", "std", "interpolation", "resize_mode")


def load_open_clip_file(model_name: str, file: Path, name: str) -> Trunk:
    """An architecture open_clip knows, with a checkpoint file; offline.

    No checkpoint tells its activation: OpenAI's weights belong to the ``-quickgelu`` names. Nor how pictures
    are prepared for it: as for the weights that were published under the model's name.
    """
    config = _model_config(model_name, name)
    _refuse_hub_text(config, name)
    if not config.get("quick_gelu") and f"{model_name}-quickgelu" in open_clip.list_models():
        warnings.warn(
            f"teacher {name!r} computes GELU; OpenAI's, DFN's and MetaCLIP's weights are of "
            f"open_clip:{model_name}-quickgelu",
            stacklevel=2,
        )
    preparation = _published_preparation(model_name, name)
    model = _create(
        name,
        lambda: open_clip.create_model(model_name, pretrained=str(file), force_preprocess_cfg=preparation),
    )
    return build_open_clip_trunk(model, name, _tokenizer(model_name, config, network=False))


def load_open_clip_folder(folder: Path) -> Trunk:
    """A folder with ``open_clip_config.json`` and weights; offline."""
    name = str(folder)
    config = read_json(folder / "open_clip_config.json").get("model_cfg")
    if not isinstance(config, dict):
        raise TeacherError(f"{folder / 'open_clip_config.json'} has no 'model_cfg'")
    _refuse_hub_text(config, name)
    find_weights(folder, _WEIGHT_NAMES)
    local = f"local-dir:{folder}"
    model = _create(name, lambda: open_clip.create_model(local, require_pretrained=True))
    return build_open_clip_trunk(model, name, _tokenizer(local, config, network=False))


def load_open_clip_tag(model_name: str, tag: str, name: str) -> Trunk:
    """A published checkpoint by its tag; downloads it unless it is cached.

    The tag knows whether it was trained with QuickGELU, so ``ViT-B-32/openai`` means what it should.
    """
    config = _model_config(model_name, name)
    tag_config = open_clip.get_pretrained_cfg(model_name, tag)
    if not tag_config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise TeacherError(f"teacher {name!r}: {model_name} has no tag {tag!r}; it has {known}")
    quick = bool(tag_config.get("quick_gelu", False))
    if config.get("quick_gelu", False) and not quick:
        raise TeacherError(
            f"teacher {name!r}: {model_name} computes QuickGELU, the weights {tag!r} were trained with GELU: "
            f"write open_clip:{model_name.replace('-quickgelu', '')}/{tag}"
        )
    model = _create(name, lambda: open_clip.create_model(model_name, pretrained=tag, force_quick_gelu=quick))
    return build_open_clip_trunk(model, name, _tokenizer(model_name, config, network=True))


def _published_preparation(model_name: str, name: str) -> dict[str, Any]:
    """How pictures are prepared for most of a model's published weights."""
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    configs = [open_clip.get_pretrained_cfg(model_name, tag) for tag in tags]
    ways = Counter(tuple((key, config.get(key)) for key in _PREPARATION) for config in configs)
    if not ways:
        return {}
    chosen = {key: value for key, value in ways.most_common(1)[0][0] if value is not None}
    if len(ways) > 1:
        warnings.warn(
            f"teacher {name!r}: weights published under {model_name} have pictures prepared in {len(ways)} "
            f"ways; these get them as most do, {chosen}; a folder with open_clip_config.json says its own",
            stacklevel=3,
        )
    return chosen


def _model_config(model_name: str, name: str) -> dict[str, Any]:
    config = get_model_config(model_name) if ":" not in model_name else None
    if config is None:
        near = difflib.get_close_matches(model_name, open_clip.list_models(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else " (see open_clip.list_models())"
        raise TeacherError(f"teacher {name!r}: open_clip has no model {model_name!r}{hint}")
    return config


def _refuse_hub_text(config: dict[str, Any], name: str) -> None:
    hub_name = (config.get("text_cfg") or {}).get("hf_model_name")
    if hub_name:
        raise TeacherError(
            f"teacher {name!r}: its text side is built from the hub's {hub_name!r}, which needs the network: "
            "use the name/TAG form, or a transformers export of the image side"
        )


def _tokenizer(model_name: str, config: dict[str, Any], network: bool) -> Callable[..., Tensor] | None:
    """The model's tokenizer; None where it would have to come from a hub and the name did not say so."""
    from_hub = bool((config.get("text_cfg") or {}).get("hf_tokenizer_name"))
    if from_hub and not network:
        folder = Path(model_name.removeprefix("local-dir:"))
        if not (model_name.startswith("local-dir:") and (folder / "tokenizer_config.json").is_file()):
            return None
    return open_clip.get_tokenizer(model_name)


def _create(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        hint = ""
        if "TorchScript" in str(error) or "torch.jit" in str(error):
            hint = " (a TorchScript archive, as OpenAI's own .pt files are: write open_clip:MODEL/openai)"
        said = describe_misfit(error)
        raise TeacherError(f"teacher {name!r}: open_clip cannot load it: {said}{hint}") from error
