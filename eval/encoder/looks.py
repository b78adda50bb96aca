"""Who looks: an encoder directory of ours, or any teacher. Pictures in, one embedding each out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bootstrap.teacher import Teacher, load_teacher
from eval.answers import InputError
from sparse_vlm import load_encoder
from sparse_vlm.fingerprint import hash_tensors
from sparse_vlm.transform import ImageTransform


@dataclass(frozen=True)
class Look:
    """One way of seeing.

    Attributes:
        name: As given on the command line.
        tokens: Of a picture, class token included.
        prepare: Picture to pixels (3, H, W).
        embed: Pixels (B, 3, H, W) to embeddings (B, E), fp32.
        stamp: Hash of the weights, and everything else that an embedding depends on: architecture, transform,
            token count.
    """

    name: str
    tokens: int
    prepare: Callable[[Image.Image], Tensor]
    embed: Callable[[Tensor], Tensor]
    stamp: str


def load_encoder_look(directory: Path, num_tokens: int | None = None, device: str = "cpu") -> Look:
    """An encoder directory.

    Raises:
        InputError: If it cannot be loaded.
    """
    try:
        encoder = load_encoder(directory, device=torch.device(device)).eval()
        if num_tokens is not None:
            encoder.check_tokens(num_tokens)
    except (ValueError, OSError) as error:
        raise InputError(f"The encoder in {directory} cannot be loaded: {error}") from None

    @torch.inference_mode()
    def embed(pixels: Tensor) -> Tensor:
        return encoder(pixels.to(device), num_tokens).pooled.float().cpu()

    tokens = num_tokens or encoder.num_tokens
    config = json.dumps(encoder.config.to_dict(), sort_keys=True)
    stamp = f"{hash_tensors(encoder.state_dict())}/{config}/{encoder.transform.config}/{tokens}"
    return Look(str(directory), tokens, encoder.transform, embed, stamp)


def load_teacher_look(name: str, weights: str | None = None, device: str = "cpu") -> tuple[Look, Teacher]:
    """A teacher by `bootstrap.teacher`'s names or directories; with it, the teacher for its text side.

    Raises:
        InputError: If it cannot be loaded.
    """
    try:
        teacher = load_teacher(name, weights, device)
    except (ValueError, OSError) as error:
        raise InputError(f"The teacher {name} cannot be loaded: {error}") from None

    @torch.inference_mode()
    def embed(pixels: Tensor) -> Tensor:
        pooled = teacher(pixels.to(device)).pooled
        if pooled is None:
            raise InputError(f"The teacher {name} makes no embedding of a picture.")
        return pooled.float().cpu()

    spec = teacher.spec
    tokens = spec.grid[0] * spec.grid[1] + spec.num_prefix
    # Activation, heads, pooling and epsilon are in no weight.
    stamp = f"{hash_tensors(teacher.vision_state_dict())}/{dataclasses.replace(spec, name='')}"
    return Look(name, tokens, ImageTransform(spec.transform), embed, stamp), teacher
