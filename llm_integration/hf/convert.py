"""Between encoder directories and the transformers model, without loss in either direction."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from sparse_vlm import SparseFormer, TransformConfig, load_encoder
from sparse_vlm.checkpoint import PREPROCESSOR_FILE, load_config

from .configuration_sparseformer import SparseFormerVisionConfig
from .modeling_sparseformer import SparseFormerVisionModel

_POOLING_HEAD = ("head.pool.", "head.proj.")


def build_vision_model(
    encoder: SparseFormer, num_tokens: int | None = None, pooling_head: bool = True
) -> SparseFormerVisionModel:
    """The transformers model that holds an encoder's own weights (shared, not copied).

    Args:
        encoder: the encoder; it and the model share their parameters afterwards.
        num_tokens: tokens per picture; by default the encoder's.
        pooling_head: keep the layers behind the pooled embedding (see :class:`SparseFormerVisionConfig`).

    Raises:
        ValueError: for a token count that the encoder cannot run with.
    """
    config = SparseFormerVisionConfig(
        architecture=encoder.config.to_dict(),
        num_tokens=num_tokens,
        pooling_head=pooling_head,
        transform=encoder.transform.config.to_dict(),
        dtype=encoder.dtype,
    )
    with torch.device("meta"):
        model = SparseFormerVisionModel(config)
    weights = encoder.state_dict()
    if not pooling_head:
        weights = {key: value for key, value in weights.items() if not key.startswith(_POOLING_HEAD)}
    model.load_state_dict(weights, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def load_vision_model(
    directory: str | PathLike[str],
    num_tokens: int | None = None,
    pooling_head: bool = True,
    dtype: torch.dtype | None = None,
) -> SparseFormerVisionModel:
    """Read an encoder directory as a transformers model, strictly.

    Raises:
        sparse_vlm.EncoderDirectoryError: if anything is missing or does not fit.
        ValueError: for a token count that the encoder cannot run with.
    """
    return build_vision_model(load_encoder(directory, dtype=dtype), num_tokens, pooling_head)


def build_encoder_from(
    model: SparseFormerVisionModel, head_from: str | PathLike[str] | None = None
) -> SparseFormer:
    """The encoder that holds a transformers model's own weights (shared, not copied).

    Args:
        model: the tower.
        head_from: an encoder directory that lends its pooling head to a tower without one, and its image
            transform to one that knows none; normally the one the tower came from.

    Raises:
        ValueError: if the pooling head or the image transform is nowhere to be found.
    """
    core, transform = model.config.core, _find_transform(model, head_from)
    weights = dict(model.state_dict())
    if not model.config.pooling_head:
        if head_from is None:
            raise ValueError(
                "this tower was built without the pooling head that an encoder directory holds: name the "
                "encoder directory it came from (head_from)"
            )
        donor = load_encoder(head_from, dtype=model.dtype)
        if donor.config != core:
            raise ValueError(f"the encoder at {head_from} has another architecture than this tower")
        lent = {key: value for key, value in donor.state_dict().items() if key.startswith(_POOLING_HEAD)}
        weights.update({key: value.to(model.device) for key, value in lent.items()})
    with torch.device("meta"):
        encoder = SparseFormer(core, transform)
    encoder.load_state_dict(weights, strict=True, assign=True)
    return encoder.eval()


def _find_transform(model: SparseFormerVisionModel, head_from: str | PathLike[str] | None) -> TransformConfig:
    """The image transform that a tower keeps, or that of the encoder directory it came from.

    Raises:
        ValueError: if it is nowhere to be found.
    """
    kept = model.config.transform
    if kept is not None:
        return TransformConfig.from_dict(kept, "vision_config.transform")
    # AutoModel reads config and weights of an encoder directory, and no image transform.
    place = head_from or model.name_or_path
    if not place or (head_from is None and not (Path(place) / PREPROCESSOR_FILE).is_file()):
        raise ValueError(
            "this model does not know its image transform, so no encoder directory can be written from it: "
            "set config.transform, or name the encoder directory it came from (head_from)"
        )
    core, transform = load_config(place)
    if core != model.config.core:
        raise ValueError(f"the encoder at {place} has another architecture than this tower")
    return transform
