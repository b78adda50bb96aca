"""The data path: pictures per second of one core, and the ceiling that the machinery itself sets."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from bootstrap.data import DataConfig, TrainView, build_stream
from bootstrap.data.views import random_region, view_seed
from eval.answers import InputError
from eval.bench.turns import Laps, format_spread, ratio, table, take_turns
from eval.costs.clock import Timing
from sparse_vlm.presets import load_preset
from sparse_vlm.transform import pixels_to_tensor

_PRESET = "sparseformer_btsp_openai_clip_base"


class SyntheticSource:
    """Any number of pictures that are all the same bytes.

    Args:
        count: pictures.
        data: what each of them reads.
    """

    title = "synthetic pictures"

    def __init__(self, count: int, data: bytes = b"") -> None:
        self.count = count
        self.data = data

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        """The same for every index."""
        return self.data

    def name(self, index: int) -> str:
        """Its number."""
        return str(index)

    def fingerprint(self) -> str:
        """Of the count."""
        return f"synthetic-{self.count}"


def make_photograph(width: int, height: int) -> bytes:
    """A JPEG with about the detail of a photograph: smooth shapes and some grain, quality 87."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = generator.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(smooth, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=87)
    return file.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench data`."""
    parser.add_argument(
        "--size", nargs="+", default=["640x480", "1280x960", "2560x1920"], help="WIDTHxHEIGHT of the JPEGs"
    )
    parser.add_argument("--pictures", type=int, default=8, help="pictures in one timed piece (default 8)")


def plain_view(view: TrainView) -> Callable[[bytes, int, int], torch.Tensor]:
    """The same crop the straightforward way: decode everything, crop, resize."""

    def look(data: bytes, index: int, number: int) -> torch.Tensor:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        region = random_region(
            *picture.size, view.scale, view.ratio, view.flip, view_seed(view.seed, index, number)
        )
        crop = picture.crop((int(region.left), int(region.top), int(region.right), int(region.bottom)))
        crop = crop.resize((view.transform.width, view.transform.height), Image.Resampling.BILINEAR)
        if region.mirrored:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return pixels_to_tensor(crop, view.transform.mean, view.transform.std)

    return look


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Decodes in this process, so that one core does all the work.

    Raises:
        InputError: If a size cannot be read.
    """
    if options.pictures < 1:
        raise InputError("--pictures must be at least 1.")
    view = TrainView(load_preset(_PRESET)[1])
    plain = plain_view(view)
    works: dict[str, Callable[[], Any]] = {}
    for size in options.size:
        width, _, height = size.partition("x")
        if not (width.isdigit() and height.isdigit()) or min(int(width), int(height)) < 32:
            raise InputError(f"--size {size}: write WIDTHxHEIGHT in pixels, at least 32x32.")
        data = make_photograph(int(width), int(height))
        works[f"{size} ours"] = _repeat(view, data, options.pictures)
        works[f"{size} plain"] = _repeat(plain, data, options.pictures)
    works["machinery"] = ceiling(options.pictures)
    laps = take_turns(works, options.rounds)
    sizes = {size: _compare(laps, size, options.pictures) for size in options.size}
    return {"sizes": sizes, "ceiling": _speed(laps["machinery"], 64 * options.pictures)}


def ceiling(batches: int) -> Callable[[], Any]:
    """The stream with a view that decodes nothing: planning, collecting and stacking batches of 64."""
    config = DataConfig(source="synthetic", workers=0)
    source = SyntheticSource(100_000)
    stream = build_stream(config, load_preset(_PRESET)[1], batch_size=64, source=source)
    picture = torch.zeros(3, 224, 224)
    stream.view = lambda data, index, view: picture
    endless = iter(stream)
    return lambda: [next(endless) for _ in range(batches)]


def _repeat(view: Callable[[bytes, int, int], torch.Tensor], data: bytes, count: int) -> Callable[[], Any]:
    return lambda: [view(data, index, 0) for index in range(count)]


def _compare(laps: dict[str, Laps], size: str, pictures: int) -> dict[str, Any]:
    ours, plain = laps[f"{size} ours"], laps[f"{size} plain"]
    return {
        "ours": _speed(ours, pictures),
        "plain": _speed(plain, pictures),
        "times_faster": {clock: vars(ratio(plain, ours, clock)) for clock in ("wall", "cpu")},
    }


def _speed(laps: Laps, pictures: int) -> dict[str, float]:
    return {clock: pictures / laps.summary(clock).median for clock in ("wall", "cpu")}


def show(report: dict[str, Any]) -> str:
    """Pictures per second of processor time."""
    rows = [
        [
            size,
            f"{row['ours']['cpu']:.0f}",
            f"{row['plain']['cpu']:.0f}",
            format_spread(Timing(**row["times_faster"]["cpu"])),
        ]
        for size, row in report["sizes"].items()
    ]
    return (
        "Pictures per second of one core's processor time, JPEG to a normalised 224-pixel view.\n"
        + table(["JPEG", "ours", "plain", "times faster"], rows)
        + f"\nCeiling without decoding: {report['ceiling']['cpu']:.0f} pictures per second."
    )
