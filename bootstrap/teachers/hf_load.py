"""Loading transformers' ViTs from a folder, or by a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

from sparse_vlm.inherit_convert import listed
from sparse_vlm.preprocessor import from_preprocessor_dict
from sparse_vlm.transform import TransformConfig

from .files import read_json
from .hf_vit import LAYOUT_OF_CLASS, HfTrunk
from .spec import TeacherError

# What a configuration's model_type stands for when it does not name one of our classes itself.
_DEFAULT_CLASS = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
}
# Image classifiers hold such a model's image tower, without its text side, and a head of their own.
_TOWER_OF_CLASSIFIER = {
    "CLIPForImageClassification": "CLIPVisionModel",
    "SiglipForImageClassification": "SiglipVisionModel",
}
# Tensors that a checkpoint may hold beside the image side: heads of other tasks, the text side.
_KNOWN_EXTRAS = ("pooler.", "vit.pooler.", "classifier.", "text_model.", "text_projection.", "logit_")
_PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")


def load_hf(place: str, name: str) -> HfTrunk:
    """A model of transformers; a folder is read offline, any other place is a hub name.

    Args:
        place: folder or hub name.
        name: how the teacher was asked for, for messages.

    Raises:
        TeacherError: with one clear sentence.
    """
    local = Path(place).is_dir()
    if not local and (place.startswith((".", "/", "~")) or place.count("/") > 1):
        raise TeacherError(f"teacher {name!r}: there is no folder {place!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=local)
    except Exception as error:
        raise TeacherError(
            f"teacher {name!r}: transformers cannot read its configuration: {error}"
        ) from error
    model_class = _model_class(config, name)
    transform = _transform(place, local, name)
    if model_class in _TOWER_OF_CLASSIFIER.values():
        config = getattr(config, "vision_config", config)
    options: dict[str, Any] = {"add_pooling_layer": False} if model_class == "ViTModel" else {}
    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            place, config=config, local_files_only=local, output_loading_info=True, **options
        )
    except Exception as error:
        raise TeacherError(f"teacher {name!r}: transformers cannot load its weights: {error}") from error
    missing = sorted(info["missing_keys"])
    extra = sorted(key for key in info["unexpected_keys"] if not key.startswith(_KNOWN_EXTRAS))
    if missing or extra:
        parts = [f"lack {len(missing)} tensors ({listed(missing)})"] if missing else []
        parts += [f"hold {len(extra)} unknown ones ({listed(extra)})"] if extra else []
        raise TeacherError(f"teacher {name!r}: its weights do not fit {model_class}: they {', '.join(parts)}")
    return HfTrunk(model, name, transform, _tokenizer_source(place, local, model_class))


def _model_class(config: Any, name: str) -> str:
    kind = getattr(config, "model_type", "")
    if kind not in _DEFAULT_CLASS:
        known = ", ".join(_DEFAULT_CLASS)
        raise TeacherError(
            f"teacher {name!r}: model type {kind!r} is none of transformers' plain ViTs ({known})"
        )
    if getattr(config, "use_swiglu_ffn", False):
        raise TeacherError(f"teacher {name!r}: its MLPs are SwiGLU (gated), not two linear layers")
    written = [_TOWER_OF_CLASSIFIER.get(each, each) for each in config.architectures or []]
    named = [each for each in written if each in LAYOUT_OF_CLASS]
    return named[0] if named else _DEFAULT_CLASS[kind]


def _transform(place: str, local: bool, name: str) -> TransformConfig:
    for file_name in _PREPROCESSOR_FILES:
        try:
            file = cached_file(
                place,
                file_name,
                local_files_only=local,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        except Exception as error:
            raise TeacherError(f"teacher {name!r}: {file_name} cannot be fetched: {error}") from error
        if file is None:
            continue
        fields = read_json(Path(file))
        if "image_processor_type" not in fields and "image_processor" not in fields and "size" not in fields:
            continue
        try:
            return from_preprocessor_dict(fields, source=file_name)
        except ValueError as error:
            raise TeacherError(f"teacher {name!r}: {error}") from None
    raise TeacherError(
        f"teacher {name!r} has no {_PREPROCESSOR_FILES[0]}, so nothing says how its pictures are prepared: "
        "copy that file from where the model came from"
    )


def _tokenizer_source(place: str, local: bool, model_class: str) -> str | None:
    if model_class not in ("CLIPModel", "SiglipModel"):
        return None
    if local and not any((Path(place) / file).is_file() for file in _TOKENIZER_FILES):
        return None
    return place
