"""Something real on a laptop, without a GPU or a hub: ``python -m bootstrap.quickstart``.

Writes generated scenes, bootstraps a 49-token SparseFormer from the small CLIP in ``assets/scenes_clip`` on
their pictures alone, and compares the two on scenes whose combinations of shape and colour nobody has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparse_vlm.atomic import write_atomic
from sparse_vlm.checkpoint import load_encoder, load_provenance

from .config import BootstrapConfig, read_config
from .cost import count_gmacs, measure_speed
from .evaluate import HeldOut
from .figures import align
from .memory import keep_freed_memory
from .report import build_report
from .scenes.__main__ import SUMMARY
from .scenes.__main__ import main as write_scenes
from .teacher import Teacher, load_teacher
from .train import bootstrap

_CONFIG = "configs/bootstrap/quickstart.yaml"
_TRAIN_SCENES = 4000
_HELDOUT_SCENES = 1000
_SCENES_SEED, _SCENES_SIZE = 0, 96
_SPEED_BATCH = 16


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bootstrap.quickstart", description=__doc__)
    parser.add_argument("--config", default=_CONFIG, help=f"bootstrap settings (default {_CONFIG})")
    parser.add_argument("--train", type=int, default=_TRAIN_SCENES, help="unlabelled scenes to write")
    parser.add_argument("--heldout", type=int, default=_HELDOUT_SCENES, help="held-out scenes to write")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="processes that share the training (default 2, or 1 on a single core)",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="settings on top of the file"
    )
    options = parser.parse_args(arguments)
    keep_freed_memory()
    started = time.time()
    try:
        config = read_config(options.config, tuple(options.overrides))
        if config.heldout.source is None or config.heldout.truth == "none":
            raise ValueError(
                "the table at the end needs heldout.source and heldout.truth; bootstrap.train does not"
            )
        _write_scenes(config, options.train, options.heldout)
        directory = _train(config, options.config, options.overrides, options.processes)
        rows, figures = _compare(config, directory)
        minutes = (time.time() - started) / 60
        page = Path(config.out) / "report.html"
        note = (
            f"{figures['n']} held-out scenes whose combination of shape and colour was in no training "
            f"picture; zero-shot over {figures['classes']} classes; {figures['pictures_seen']} unlabelled "
            "pictures seen."
        )
        write_atomic(
            Path(config.out) / "quickstart.json", json.dumps({**figures, "minutes": minutes}, indent=2)
        )
        write_atomic(page, build_report(Path(config.out), rows, note))
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"quickstart: {error}") from None
    print(align(rows))
    print(f"\n{note}\n{minutes:.1f} minutes; encoder: {directory}; report: {page}")


def _write_scenes(config: BootstrapConfig, train: int, heldout: int) -> None:
    """Write the scenes that the settings read, unless just these are there already."""
    if not isinstance(config.data.source, str):
        raise ValueError("quickstart writes one folder of scenes: data.source must be a single place")
    place = Path(config.data.source)
    if place.parts[-2:] != ("train", "images") or len(place.parts) < 3:
        raise ValueError(
            "quickstart trains on scenes that it writes itself: data.source must be FOLDER/train/images, got "
            f"{config.data.source}; python -m bootstrap.train trains on pictures of your own"
        )
    folder = place.parents[1]
    summary = folder / SUMMARY
    if summary.is_file():
        found = json.loads(summary.read_text(encoding="utf-8"))
        counts = {name: found.get(name, {}).get("pictures") for name in ("train", "heldout")}
        same = (found.get("seed"), found.get("size")) == (_SCENES_SEED, _SCENES_SIZE)
        if same and counts == {"train": train, "heldout": heldout}:
            return
    print(f"writing {train} + {heldout} scenes to {folder}", file=sys.stderr)
    wanted = {"train": train, "heldout": heldout, "seed": _SCENES_SEED, "size": _SCENES_SIZE}
    words = [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
    failed = write_scenes(["--out", str(folder), *words, "--replace"])
    if failed:
        raise ValueError(f"the scenes could not be written to {folder}")


def _train(config: BootstrapConfig, path: str, overrides: list[str], processes: int) -> Path:
    """Bootstrap, in several processes of one thread each: small steps leave threads idle."""
    if processes == 1:
        return bootstrap(config)
    if processes < 1 or config.batch_size % processes:
        raise ValueError(
            f"--processes {processes} does not divide batch_size={config.batch_size}: choose another number"
        )
    threads = max(1, (os.cpu_count() or 1) // processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    share = f"batch_size={config.batch_size // processes}"
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "bootstrap.train", path, *overrides, share],
        # The warning that the log level silences is about the warm-up, which trains a part of the weights.
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        check=False,
    )
    if done.returncode:
        raise ValueError(f"training ended with exit status {done.returncode}; its last words are above")
    return Path(config.out) / "encoder"


def _compare(config: BootstrapConfig, directory: Path) -> tuple[list[list[str]], dict[str, Any]]:
    """Teacher against student, on the same pictures and the same clock."""
    teacher = load_teacher(config.teacher.name, config.teacher.weights)
    encoder = load_encoder(directory).requires_grad_(False)
    heldout = HeldOut(config.heldout, teacher)
    scores = heldout.score(encoder)
    provenance = load_provenance(directory)
    size = teacher.spec.image_size
    looks = {"teacher": teacher, "student": encoder}
    gmacs = {name: count_gmacs(look, size) for name, look in looks.items()}
    speeds = measure_speed(looks, torch.zeros(_SPEED_BATCH, 3, *size))
    figures: dict[str, Any] = {
        **scores,
        "tokens": {"teacher": _teacher_tokens(teacher), "student": encoder.num_tokens},
        "gmacs": gmacs,
        "pictures_per_second": speeds,
        "n": len(heldout.kept),
        "classes": len(heldout.labels) if heldout.labels is not None else 0,
        "pictures_seen": provenance["pictures_seen"],
    }
    return _rows(figures), figures


def _teacher_tokens(teacher: Teacher) -> int:
    rows, columns = teacher.spec.grid
    return rows * columns + teacher.spec.num_prefix


def _rows(figures: dict[str, Any]) -> list[list[str]]:
    tokens, gmacs, speed = figures["tokens"], figures["gmacs"], figures["pictures_per_second"]
    head = ["", "tokens", "zero-shot top-1", "kept", "agreement", "cosine", "GMACs", "pictures/s"]
    return [
        head,
        [
            "teacher (ViT)",
            str(tokens["teacher"]),
            f"{figures['teacher_top1']:.1%}",
            "100%",
            "100%",
            "1.000",
            f"{gmacs['teacher']:.3f}",
            f"{speed['teacher']:.0f}",
        ],
        [
            "student (SparseFormer)",
            str(tokens["student"]),
            f"{figures['top1']:.1%}",
            f"{figures['kept']:.1%}",
            f"{figures['agreement']:.1%}",
            f"{figures['cosine']:.3f}",
            f"{gmacs['student']:.3f}",
            f"{speed['student']:.0f}",
        ],
    ]


if __name__ == "__main__":
    main()
