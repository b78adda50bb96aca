"""Trains the small CLIP of the embedded default on scenes, with open_clip's own model and loss.

    python -m bootstrap.train_clip configs/scenes/clip.yaml [key=value ...]

The result is a directory that `open_clip.create_model("local-dir:DIRECTORY")` and
`open_clip.get_tokenizer("local-dir:DIRECTORY")` load without a network.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip.transformer import PatchDropout
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from bootstrap.config import read_settings
from bootstrap.memory import keep_freed_memory
from bootstrap.scenes.clip_eval import class_embeddings, zero_shot_accuracy
from bootstrap.scenes.clip_model import (
    WEIGHTS,
    ClipModelConfig,
    build_clip,
    enlarge,
    save_clip,
    write_description,
)
from bootstrap.scenes.clip_texts import (
    CLASS_TEMPLATES,
    prompt_groups,
)
from bootstrap.scenes.draw import draw_scene
from bootstrap.scenes.scene import Scene, build_scene
from bootstrap.scenes.text import caption
from bootstrap.scenes.vocabulary import COLORS, SEEN_PAIRS, SHAPES, TEXTURES
from sparse_vlm.atomic import write_atomic
from sparse_vlm.settings import settings_to_dict

log = logging.getLogger("bootstrap.train_clip")


@dataclass(frozen=True)
class Phase:
    """A stretch of training. Small pictures or dropped patches make a step cheaper than a full one."""

    steps: int
    image_size: int = 96
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"phases: steps must be at least 1, got {self.steps}.")
        if self.image_size < 1:
            raise ValueError(f"phases: image_size must be at least 1, got {self.image_size}.")
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"phases: patch_dropout is a fraction below 1, got {self.patch_dropout}.")

    @property
    def cost(self) -> float:
        """What the phase costs, counted in patches, up to a constant; the learning rate follows it."""
        return self.steps * self.image_size**2 * (1.0 - self.patch_dropout)


@dataclass(frozen=True)
class TrainClipConfig:
    """The recipe: model, phases and optimiser; `start` names an earlier result to go on from."""

    out: Path = Path("runs/scenes_clip")
    start: Path | None = None
    seed: int = 0
    data_seed: int = 0
    first_scene: int = 0
    phases: tuple[Phase, ...] = (Phase(1000, 48), Phase(200, 96))
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    prompt_weight: float = 1.0
    pair_prompts_every: int = 4
    grey_every: int = 0
    eval_every: int = 100
    eval_pictures: int = 200
    final_pictures: int = 2000
    threads: int = 2
    model: ClipModelConfig = field(default_factory=ClipModelConfig)

    def __post_init__(self) -> None:
        if not self.phases or self.batch_size < 2:
            raise ValueError("There must be at least one phase, and batch_size must be at least 2.")
        counts = ("eval_every", "warmup_steps", "eval_pictures", "final_pictures", "threads")
        if any(getattr(self, name) < 1 for name in counts):
            raise ValueError(f"{', '.join(counts[:-1])} and {counts[-1]} must be at least 1.")
        for name in ("lr", "weight_decay", "prompt_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {getattr(self, name)}.")
        if self.pair_prompts_every < 1 or self.grey_every < 0 or self.grey_every == 1:
            raise ValueError("pair_prompts_every must be 1 or more, and grey_every 0 or at least 2.")
        full = self.model.image_size
        if self.phases[-1].image_size != full:
            raise ValueError(f"The last phase must train at model.image_size ({full} pixels).")
        for phase in self.phases:
            if full % phase.image_size or phase.image_size % self.model.patch_size:
                raise ValueError(
                    f"phases: image_size {phase.image_size} must divide model.image_size ({full}) and be a "
                    f"multiple of model.patch_size ({self.model.patch_size})."
                )
        if self.start is not None and self.phases[0].image_size != full:
            raise ValueError(f"A run that goes on from `start` must begin at {full} pixels.")


def build_batch(config: TrainClipConfig, step: int) -> tuple[torch.Tensor, list[str], list[Scene]]:
    """Draws one batch: pictures (B, 3, H, W) uint8, captions, scenes. A function of the seed and the step."""
    first = config.first_scene + step * config.batch_size
    scenes = [build_scene(config.data_seed, first + offset) for offset in range(config.batch_size)]
    size = config.model.image_size
    pixels = [
        torch.frombuffer(bytearray(draw_scene(scene, size).tobytes()), dtype=torch.uint8) for scene in scenes
    ]
    images = torch.stack(pixels).unflatten(1, (size, size, 3)).permute(0, 3, 1, 2)  # (B, 3, H, W)
    return images, [caption(scene) for scene in scenes], scenes


def take_color_away(images: torch.Tensor, captions: list[str], every: int) -> tuple[torch.Tensor, list[str]]:
    """Makes each `every`-th picture grey and strikes the colours from its caption; 0 changes nothing.

    A colour that never comes with some shape speaks against that shape; grey pictures have to be told by
    their outline alone, which is what carries over to the held-out pairs.

    Args:
        images: (B, 3, H, W) pictures in floating point.
        captions: B captions.
        every: Distance of the grey pictures in the batch.
    """
    if not every:
        return images, captions
    images, captions = images.clone(), list(captions)
    images[::every] = images[::every].mean(1, keepdim=True)  # (b, 3, H, W)
    for row in range(0, len(captions), every):
        captions[row] = " ".join(word for word in captions[row].split() if word not in COLORS)
    return images, captions


def prompt_targets(scenes: list[Scene], grey_every: int = 0) -> dict[str, torch.Tensor]:
    """For each group of `prompt_groups` the index of the right text, -100 where there is none: (B,)."""
    mains = [scene.main for scene in scenes]
    colors = tuple(COLORS)
    targets = {
        "pair": torch.tensor([SEEN_PAIRS.index((main.shape, main.color)) for main in mains]),
        "color": torch.tensor([colors.index(main.color) for main in mains]),
        "shape": torch.tensor([SHAPES.index(main.shape) for main in mains]),
        "texture": torch.tensor([TEXTURES.index(main.texture) for main in mains]),
    }
    if grey_every:
        targets["pair"][::grey_every] = targets["color"][::grey_every] = -100
    return targets


def prompt_loss(
    images: torch.Tensor,
    texts: torch.Tensor,
    sizes: dict[str, int],
    targets: dict[str, torch.Tensor],
    scale: torch.Tensor,
) -> torch.Tensor:
    """Mean cross-entropy of pictures (B, E) against each group of texts (sum of sizes, E)."""
    logits = (scale * images @ texts.T).split(list(sizes.values()), dim=-1)
    terms = [F.cross_entropy(part, targets[name]) for part, name in zip(logits, sizes, strict=True)]
    return torch.stack(terms).mean()


def evaluate(directory: Path, config: TrainClipConfig, count: int) -> dict[str, dict[str, float]]:
    """Zero-shot figures of a saved model, read back through open_clip's own loaders."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    model.eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{directory}")
    classes = class_embeddings(model, tokenize, CLASS_TEMPLATES)
    size = config.model.image_size
    return {
        split: zero_shot_accuracy(model, preprocess, classes, split, config.data_seed, count, size)
        for split in ("valid", "heldout")
    }


def train(config: TrainClipConfig) -> dict[str, Any]:
    """Trains, saves along the way, and returns the final figures."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "config.json", json.dumps(settings_to_dict(config), indent=2) + "\n")
    write_description(out, config.model)
    tokenize = open_clip.get_tokenizer(f"local-dir:{out}")
    rng = random.Random(config.seed)
    contrast = ClipLoss()
    model, optimizer = build_clip(config.model, config.phases[0].image_size), None
    if config.start is not None:
        model.load_state_dict({k: v.float() for k, v in load_file(config.start / WEIGHTS).items()})
    started, step, work = time.monotonic(), 0, 0.0
    whole_work = sum(phase.cost for phase in config.phases)
    with (
        (out / "metrics.jsonl").open("w") as metrics,
        tqdm(total=sum(phase.steps for phase in config.phases), unit="step", disable=None) as bar,
    ):
        for phase in config.phases:
            model, optimizer = enter_phase(phase, config, model, optimizer)
            for _ in range(phase.steps):
                pixels, captions, scenes = build_batch(config, step)
                images = pixels.float().div_(255).sub_(0.5).div_(0.25)
                images, captions = take_color_away(images, captions, config.grey_every)
                images = F.avg_pool2d(images, config.model.image_size // phase.image_size)
                groups = prompt_groups(rng, pairs=step % config.pair_prompts_every == 0)
                prompts = tokenize([text for group in groups.values() for text in group])
                warmup, decay = (step + 1) / config.warmup_steps, math.cos(math.pi * work / whole_work)
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * min(warmup, 0.5 + 0.5 * decay)

                image_features, text_features, scale = model(images, tokenize(captions))
                prompt_features = model.encode_text(prompts, normalize=True)
                sizes = {name: len(texts) for name, texts in groups.items()}
                paired = contrast(image_features, text_features, scale)
                targets = prompt_targets(scenes, config.grey_every)
                named = prompt_loss(image_features, prompt_features, sizes, targets, scale)
                loss = paired + config.prompt_weight * named
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(
                        f"The loss is {loss.item()} at step {step}: lower lr ({config.lr})."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, math.log(100))

                step, work = step + 1, work + phase.cost / phase.steps
                bar.update()
                if step % 20 == 0:
                    row = {"step": step, "minutes": (time.monotonic() - started) / 60}
                    row |= {"contrastive": paired.item(), "prompts": named.item()}
                    print(json.dumps(row), file=metrics, flush=True)
                    bar.set_postfix(contrastive=f"{paired.item():.3f}", prompts=f"{named.item():.3f}")
                if step % config.eval_every == 0 and phase.image_size == config.model.image_size:
                    save_clip(out, model, config.model)
                    log.info("step %d: %s", step, evaluate(out, config, config.eval_pictures))
    minutes = round((time.monotonic() - started) / 60, 1)
    save_clip(out, model, config.model)
    figures = {"steps": step, "pictures_seen": step * config.batch_size, "minutes": minutes}
    result = {**figures, "zero_shot": evaluate(out, config, config.final_pictures)}
    write_atomic(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def enter_phase(
    phase: Phase, config: TrainClipConfig, model: CLIP, optimizer: torch.optim.AdamW | None
) -> tuple[CLIP, torch.optim.AdamW]:
    """Model and optimiser for a phase; a larger picture gets a stretched position table."""
    if tuple(model.visual.image_size) != (phase.image_size, phase.image_size):
        larger = build_clip(config.model, phase.image_size)
        larger.load_state_dict(enlarge(model.state_dict(), larger))
        model, optimizer = larger, build_optimizer(larger, config, optimizer, model)
    model.visual.patch_dropout = PatchDropout(phase.patch_dropout) if phase.patch_dropout else nn.Identity()
    return model.train(), optimizer or build_optimizer(model, config)


def build_optimizer(
    model: CLIP,
    config: TrainClipConfig,
    old: torch.optim.Optimizer | None = None,
    old_model: CLIP | None = None,
) -> torch.optim.AdamW:
    """AdamW without decay on vectors; the moments of an older optimiser are kept where shapes agree."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    if old is not None and old_model is not None:
        for before, after in zip(old_model.parameters(), model.parameters(), strict=True):
            if before.shape == after.shape and before in old.state:
                optimizer.state[after] = old.state[before]
    return optimizer


def main(arguments: list[str] | None = None) -> int:
    """Command line: a YAML file and `key.sub=value` overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m bootstrap.train_clip", description=__doc__.splitlines()[0]
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    given = parser.parse_args(arguments)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    try:
        config = read_settings(TrainClipConfig, given.config, given.overrides)
        print(json.dumps(train(config), indent=2))
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
