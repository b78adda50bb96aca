"""Saves tuned towers from LLaVA's trainer.

LLaVA builds the tower of a checkpoint from the path in its config and ignores tower weights inside the
checkpoint. So a tuned tower gets an encoder directory of its own beside each checkpoint, and the checkpoint's
config names that one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_vlm.atomic import write_atomic
from sparse_vlm.checkpoint import load_provenance

from .directories import TOWER_FOLDER, read_fingerprint

if TYPE_CHECKING:
    from llm_integration.tower import SparseFormerVisionTower


def build_callback() -> Any:
    """A ``TrainerCallback`` that saves the tower with every checkpoint and at the end, if it is tuned."""
    from transformers import TrainerCallback

    class SaveTunedTower(TrainerCallback):
        """Runs on every rank: under ZeRO-3 all of them are needed to put a weight together."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tower = _tuned_tower(kwargs["model"])
            if tower is None:
                return
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            names = save_tower(tower, checkpoint / TOWER_FOLDER, args.should_save)
            config = checkpoint / "config.json"
            # LLaVA's LoRA checkpoints are for resuming only and have no config.
            if args.should_save and config.is_file():
                values = {**json.loads(config.read_text(encoding="utf-8")), **names}
                write_atomic(config, json.dumps(values, indent=2, sort_keys=True) + "\n")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"]
            tower = _tuned_tower(model)
            if tower is None:
                return
            # LLaVA writes this config into the output directory right after.
            names = save_tower(tower, Path(args.output_dir) / TOWER_FOLDER, args.should_save)
            for key, value in names.items():
                setattr(model.config, key, value)

    return SaveTunedTower()


def save_tower(tower: SparseFormerVisionTower, directory: Path, writes: bool) -> dict[str, str]:
    """Write a tuned tower as an encoder directory; every rank has to call it.

    Args:
        tower: the tower.
        directory: where to.
        writes: whether this rank is the one that writes.

    Returns:
        What LLaVA's config has to say about it.
    """
    directory = directory.resolve()
    encoder = tower.encoder
    with _gathered(list(encoder.parameters())):
        if writes:
            source = Path(tower.vision_tower_name)
            origin = load_provenance(source) if (source / "provenance.json").is_file() else {}
            encoder.save(directory, {"tuned_in": "LLaVA", "tuned_from": source.name, "before_tuning": origin})
    fingerprint = _agree(read_fingerprint(directory) if writes else None)
    return {"mm_vision_tower": str(directory), "mm_vision_tower_sha256": fingerprint}


def _tuned_tower(model: Any) -> SparseFormerVisionTower | None:
    from llm_integration.tower import SparseFormerVisionTower

    tower = model.get_vision_tower() if hasattr(model, "get_vision_tower") else None
    return tower if isinstance(tower, SparseFormerVisionTower) and tower.tuned and tower.is_loaded else None


@contextlib.contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    """Put partitioned weights together for a while; under ZeRO-3 each rank holds a piece, of size 0 to us.

    One by one: of several weights DeepSpeed (up to 0.18) awaits only the last, and over gloo the others may
    still be on their way when they are read.
    """
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            if hasattr(parameter, "ds_id"):
                from deepspeed import zero

                stack.enter_context(zero.GatheredParameters([parameter]))
        yield


def _agree(value: str | None) -> str:
    """What the writing rank knows, on every rank."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        value = box[0]
    if value is None:
        raise RuntimeError("no process saved the tuned vision tower")
    return value
