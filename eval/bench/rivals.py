"""What a user would use instead: the official SparseFormer, and ViTs of open_clip and transformers."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bootstrap.cost import count_work
from eval.answers import InputError
from eval.costs.shapes import list_towers
from sparse_vlm import SparseFormer, build_encoder
from sparse_vlm.convert import name_table

# open_clip's names, and the same shapes under eval.cost's names.
VITS = {"ViT-B-16": "vit_b_16", "ViT-L-14": "vit_l_14", "ViT-L-14-336": "vit_l_14_336"}
LIBRARIES = ("open_clip", "transformers")


@dataclass(frozen=True)
class Candidate:
    """A vision encoder to time.

    Attributes:
        name: As printed.
        look: From pictures (B, 3, H, W) to whatever it makes of them.
        image_size: Side of its pictures in pixels.
        gmacs: Billions of multiply-adds for one picture.
    """

    name: str
    look: Callable[[Tensor], Any]
    image_size: int
    gmacs: float


@torch.no_grad()
def build_ours(preset: str) -> SparseFormer:
    """An encoder with random weights whose tokens look at different places.

    A fresh encoder's RoIs stand still and its mixing is the same for all tokens; trained ones' are not.

    Raises:
        InputError: If there is no such preset.
    """
    try:
        encoder = build_encoder(preset).eval()
    except ValueError as error:
        raise InputError(f"--preset: {error}") from None
    for parameter in encoder.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return encoder


def build_official(root: Path, preset: str, ours: SparseFormer) -> nn.Module:
    """The official package's model of the same name with our weights.

    Args:
        root: A checkout of github.com/showlab/sparseformer.
        preset: Its name there and here.
        ours: Whose weights it gets.

    Raises:
        InputError: If the folder is no such checkout, or its package cannot be imported.
    """
    package = root / "sparseformer"
    if not (package / "sparseformer" / "modeling.py").is_file():
        raise InputError(
            f"--official {root} has no sparseformer/sparseformer/modeling.py: name a checkout of "
            "github.com/showlab/sparseformer."
        )
    sys.path.insert(0, str(package))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = importlib.import_module("sparseformer.config")
            modeling = importlib.import_module("sparseformer.modeling")
    except ImportError as error:
        raise InputError(f"--official {root} cannot be imported: {error}.") from None
    finally:
        sys.path.remove(str(package))
    model: nn.Module = modeling.SparseFormer(**names.route_name_to_config(preset)).eval()
    weights = ours.state_dict()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    renamed = {
        theirs: weights[mine].reshape(shapes[theirs]) for theirs, mine in name_table(ours.config).items()
    }
    model.load_state_dict(renamed, strict=True)
    return model


def build_vit(spec: str) -> tuple[nn.Module, int]:
    """A CLIP's image side with random weights and fused attention.

    Args:
        spec: "open_clip:ViT-L-14-336" or "transformers:ViT-L-14-336".

    Returns:
        The module and the side of its pictures in pixels.

    Raises:
        InputError: If the library or the shape is not known.
    """
    library, _, shape = spec.partition(":")
    if library not in LIBRARIES or shape not in VITS:
        raise InputError(
            f"--rival {spec}: known are {', '.join(f'{name}:{vit}' for name in LIBRARIES for vit in VITS)}."
        )
    tower = list_towers()[VITS[shape]]
    if library == "open_clip":
        from open_clip.transformer import QuickGELU, VisionTransformer

        config = tower.config
        vit = VisionTransformer(
            config.image_size,
            config.patch_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            mlp_ratio=4.0,
            output_dim=512 if shape.startswith("ViT-B") else 768,
            act_layer=QuickGELU,
        )
        return vit.eval(), tower.image_size[0]
    from transformers import CLIPVisionModel

    config = copy.deepcopy(tower.config)
    config._attn_implementation = "sdpa"
    model: Any = CLIPVisionModel(config)
    return model.eval(), tower.image_size[0]


def count_gmacs(module: nn.Module, image_size: int) -> float:
    """Billions of multiply-adds for one picture."""
    module.requires_grad_(False)  # the counter trips over parameters with gradients
    pictures = torch.zeros(1, 3, image_size, image_size)
    return count_work(lambda: module(pictures))
