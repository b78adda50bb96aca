"""Zero-shot accuracy of a CLIP on scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bootstrap.scenes.draw import draw_scene
from bootstrap.scenes.scene import build_scene
from bootstrap.scenes.vocabulary import CLASS_NAMES

Tokenize = Callable[[list[str]], torch.Tensor]


@torch.no_grad()
def class_embeddings(model: torch.nn.Module, tokenize: Tokenize, templates: Sequence[str]) -> torch.Tensor:
    """Unit embeddings of all classes, averaged over the templates: (classes, E)."""
    texts = [template.format(name) for name in CLASS_NAMES for template in templates]
    embedded = model.encode_text(tokenize(texts), normalize=True)  # type: ignore[operator]
    mean = embedded.unflatten(0, (len(CLASS_NAMES), len(templates))).mean(1)  # (classes, E)
    return torch.nn.functional.normalize(mean, dim=-1)


@torch.no_grad()
def zero_shot_accuracy(
    model: torch.nn.Module,
    preprocess: Callable[..., torch.Tensor],
    classes: torch.Tensor,
    split: str,
    seed: int,
    count: int,
    size: int,
    batch_size: int = 100,
) -> dict[str, float]:
    """Accuracy over all (shape, colour) classes, and of shape and colour by themselves.

    Args:
        model: An open_clip model, in eval.
        preprocess: Turns a picture into a (3, H, W) tensor.
        classes: (classes, E) unit embeddings from `class_embeddings`.
        split: Split of the scenes.
        seed: Seed of the scenes.
        count: How many scenes.
        size: Side of the pictures in pixels.
        batch_size: Pictures per forward pass.

    Returns:
        `accuracy`, `shape_accuracy`, `color_accuracy` (fractions) and `pictures`.
    """
    names = [tuple(name.split()) for name in CLASS_NAMES]
    right = {"accuracy": 0, "shape_accuracy": 0, "color_accuracy": 0}
    for start in range(0, count, batch_size):
        scenes = [build_scene(seed, index, split) for index in range(start, min(start + batch_size, count))]
        images = torch.stack([preprocess(draw_scene(scene, size)) for scene in scenes])  # (B, 3, H, W)
        embedded = model.encode_image(images, normalize=True)  # type: ignore[operator]
        for scene, best in zip(scenes, (embedded @ classes.T).argmax(-1).tolist(), strict=True):
            color, shape = names[best]
            right["accuracy"] += best == scene.label
            right["color_accuracy"] += color == scene.main.color
            right["shape_accuracy"] += shape == scene.main.shape
    return {**{name: hits / count for name, hits in right.items()}, "pictures": float(count)}
