"""On paper: what it takes to bootstrap a large encoder from ViT-L/14-336 on many GPUs.

Arithmetic is counted, bytes are counted, everything else is an assumption with a name and a flag. No GPU is
measured here.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from bootstrap.cost import count_work
from eval.answers import InputError
from eval.bench.turns import table
from eval.costs.shapes import list_towers
from sparse_vlm import build_encoder
from sparse_vlm.presets import load_preset

_TEACHER, _STUDENT = "vit_l_14_336", "sparseformer_btsp_openai_clip_large"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench estimate`."""
    parser.add_argument("--pictures", type=float, nargs="+", default=[1.28e6, 1e9], help="in the data set")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 256])
    parser.add_argument("--epochs", type=float, nargs="+", default=[30, 1], help="one for each data set")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU in bf16 (H200: 989)")
    parser.add_argument("--used", type=float, default=0.4, help="share of it that is reached (default 0.4)")
    parser.add_argument("--scaling", type=float, default=0.9, help="efficiency of many GPUs (default 0.9)")
    parser.add_argument("--warmup", type=float, default=0.2, help="share of hand-over steps (default 0.2)")
    parser.add_argument(
        "--storage", type=float, default=2.0, help="GB/s of stored targets that a GPU is fed with (default 2)"
    )
    parser.add_argument("--kilobytes", type=float, default=110.0, help="of a JPEG (default 110)")
    parser.add_argument(
        "--decoded", type=float, default=300.0, help="pictures a second that one core decodes (default 300)"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Counts a picture's arithmetic and multiplies.

    Raises:
        InputError: If an assumption makes no sense.
    """
    positive = (
        options.peak,
        options.storage,
        options.kilobytes,
        options.decoded,
        *options.pictures,
        *options.gpus,
        *options.epochs,
    )
    shares = (options.used, options.scaling)
    if not all(0 < number < math.inf for number in positive) or not all(0 < share <= 1 for share in shares):
        raise InputError("Everything but --warmup must be above 0, and --used and --scaling at most 1.")
    if not 0 <= options.warmup <= 1:
        raise InputError(f"--warmup is a share of the steps, 0 to 1, and is {options.warmup}.")
    if len(options.epochs) != len(options.pictures):
        raise InputError("--epochs needs one number for each of --pictures.")
    parts = count_parts()
    warm, full = work_of(parts)
    live_warm, live_full = parts["teacher"] / 3, parts["teacher"]
    average = options.warmup * warm + (1 - options.warmup) * full
    teacher = options.warmup * live_warm + (1 - options.warmup) * live_full
    target_bytes = 2 * (2 * 576 * 1024 + 768)
    rows = []
    for pictures, epochs in zip(options.pictures, options.epochs, strict=True):
        for gpus in options.gpus:
            rate = options.peak * 1e3 * options.used * options.scaling * gpus / 2  # GMACs a second
            shown = pictures * epochs
            looked = min(pictures, shown)  # different ones
            # Stored: the teacher looks once at each picture, and what it said is read at every other showing;
            # live: it looks at every showing.
            reading = (shown - looked) * target_bytes / (options.storage * 1e9 * gpus)
            stored = max((shown * average + looked * live_full) / rate, reading)
            live = shown * (average + teacher) / rate
            rows.append(
                {
                    "pictures": pictures,
                    "epochs": epochs,
                    "gpus": gpus,
                    "hours_live": live / 3600,
                    "hours_stored": stored / 3600,
                    "pictures_a_second": shown / live,
                    "read_terabytes": shown * options.kilobytes / 1e9,
                    "targets_read_terabytes": (shown - looked) * target_bytes / 1e12,
                    "decoding_cores": shown / live / options.decoded,
                    "stored_terabytes": looked * target_bytes / 1e12,
                }
            )
    return {
        "gmacs": parts,
        "warmup_gmacs": warm,
        "full_gmacs": full,
        "rows": rows,
        "assumed": _assumed(options),
    }


def count_parts() -> dict[str, float]:
    """Billions of multiply-adds for one picture, by part of teacher and student, counted without weights."""
    from transformers import CLIPVisionModel

    tower = list_towers()[_TEACHER]
    with torch.device("meta"):
        vit: Any = CLIPVisionModel(tower.config)
        student = build_encoder(_STUDENT)
    vit.requires_grad_(False)
    student.requires_grad_(False)
    pictures = torch.zeros(1, 3, *tower.image_size, device="meta")
    seen = torch.zeros(1, 3, load_preset(_STUDENT)[1].height, load_preset(_STUDENT)[1].height, device="meta")
    focus = count_work(lambda: student.focus(seen))
    whole = count_work(lambda: student(seen))
    return {
        "teacher": count_work(lambda: vit(pictures)),
        "student focusing": focus,
        "student cortex, tuned half": (whole - focus) / 2,
        "student cortex, frozen half": (whole - focus) / 2,
    }


def work_of(parts: dict[str, float]) -> tuple[float, float]:
    """Student GMACs of a warm-up step and of a full one, forward and backward.

    A backward pass costs two forward passes, of which frozen blocks need one: no gradients of their weights.
    """
    focusing = 3 * parts["student focusing"]
    cortex = 3 * parts["student cortex, tuned half"] + 2 * parts["student cortex, frozen half"]
    return focusing, focusing + cortex


def _assumed(options: argparse.Namespace) -> dict[str, float]:
    names = ("peak", "used", "scaling", "warmup", "storage", "kilobytes", "decoded")
    return {name: getattr(options, name) for name in names}


def show(report: dict[str, Any]) -> str:
    """Hours, bytes and cores, under the assumptions."""
    rows = [
        [
            f"{row['pictures']:.3g}",
            f"{row['epochs']:g}",
            str(row["gpus"]),
            f"{row['hours_live']:.3g}",
            f"{row['hours_stored']:.3g}",
            f"{row['pictures_a_second']:.3g}",
            f"{row['decoding_cores']:.0f}",
            f"{row['read_terabytes']:.3g}",
            f"{row['stored_terabytes']:.3g}",
            f"{row['targets_read_terabytes']:.3g}",
        ]
        for row in report["rows"]
    ]
    head = [
        "pictures",
        "epochs",
        "GPUs",
        "hours, live teacher",
        "hours, stored",
        "pictures/s live",
        "cores to decode",
        "TB of JPEGs read",
        "TB of targets",
        "TB of them read",
    ]
    counted = ", ".join(f"{name} {value:.1f}" for name, value in report["gmacs"].items())
    assumed = ", ".join(f"{name} {value:g}" for name, value in report["assumed"].items())
    return (
        f"Counted, GMACs a picture: {counted}.\n"
        f"A student step: {report['warmup_gmacs']:.1f} in the warm-up, {report['full_gmacs']:.1f} after it.\n"
        f"Assumed: {assumed}. No GPU was measured.\n" + table(head, rows)
    )
