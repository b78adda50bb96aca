"""How cost grows: with picture size, tokens, batch, number of pictures and processes; one chart each."""

from __future__ import annotations

import argparse
import functools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bootstrap.data.tasks import Planner, Position
from eval.answers import InputError
from eval.bench.data import SyntheticSource
from eval.bench.rivals import build_ours
from eval.bench.turns import take_turns
from sparse_vlm import SparseFormer
from sparse_vlm.atomic import write_atomic

_FILE = "growth.png"
_CHARTS = ("picture size", "tokens", "batch", "pictures", "processes")
# What one of several processes does: count forward passes for so many seconds once all are ready.
_PROCESS = """
import sys, time, torch
from eval.bench.rivals import build_ours
torch.set_num_threads(1)
kind = {"device": sys.argv[3], "dtype": getattr(torch, sys.argv[4])}
encoder, picture = build_ours(sys.argv[1]).to(**kind), torch.randn(1, 3, 224, 224).to(**kind)
with torch.inference_mode():
    encoder(picture)
    print("ready", flush=True)
    sys.stdin.readline()
    count, end = 0, time.perf_counter() + float(sys.argv[2])
    while time.perf_counter() < end:
        encoder(picture).pooled[0, 0].item()  # waits for a GPU
        count += 1
print(count / float(sys.argv[2]), flush=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench growth`."""
    parser.add_argument("--preset", default="sparseformer_btsp_augreg_base", help="our architecture")
    parser.add_argument("--picture-size", type=int, nargs="+", default=[224, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[9, 25, 49, 100, 196, 400])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--pictures", type=int, nargs="+", default=[100, 10_000, 1_000_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=8.0, help="of every process (default 8)")
    parser.add_argument("--charts", type=Path, default=Path("runs/bench"), help="folder of the picture")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every curve and draws them into one picture.

    Raises:
        InputError: If a value is too small.
    """
    values = (options.picture_size, options.tokens, options.batch, options.pictures, options.processes)
    if min(map(min, values)) < 1 or min(options.picture_size) < 32 or min(options.tokens) < 2:
        raise InputError("Counts are at least 1, tokens at least 2, pictures at least 32 pixels.")
    if not 0 < options.seconds < math.inf:
        raise InputError(f"--seconds must be above 0, and is {options.seconds}.")
    encoder = build_ours(options.preset).to(device=options.device, dtype=options.torch_dtype)
    with torch.inference_mode():
        curves = {
            "picture size": _encode(encoder, [(1, size, None) for size in options.picture_size], options),
            "tokens": _encode(encoder, [(1, 224, count) for count in options.tokens], options),
            "batch": _encode(encoder, [(batch, 224, None) for batch in options.batch], options),
        }
    curves["pictures"] = _plan(options)
    rates = [_spread(options, count) for count in options.processes]
    report: dict[str, Any] = {
        "preset": options.preset,
        "clock": "wall" if options.device.startswith("cuda") else "cpu",
        "curves": {
            name: {"x": list(x), "y": curves[name]} for name, x in zip(_CHARTS[:4], values[:4], strict=True)
        },
        "processes": {"x": list(options.processes), "y": rates},
    }
    options.charts.mkdir(parents=True, exist_ok=True)
    draw(report, options.charts / _FILE)
    report["picture"] = str(options.charts / _FILE)
    return report


def _encode(
    encoder: SparseFormer, shapes: list[tuple[int, int, int | None]], options: argparse.Namespace
) -> list[float]:
    """Seconds a forward pass of (batch, side, tokens)."""
    works: dict[str, Callable[[], Any]] = {}
    for number, (batch, side, tokens) in enumerate(shapes):
        images = torch.randn(batch, 3, side, side, device=options.device).to(options.torch_dtype)
        works[str(number)] = functools.partial(encoder, images, tokens)
    clock = "wall" if options.device.startswith("cuda") else "cpu"
    return [laps.summary(clock).median for laps in take_turns(works, options.rounds, options.device).values()]


def _plan(options: argparse.Namespace) -> list[float]:
    """Seconds until the first batch of a data set is planned."""

    def work(count: int) -> Callable[[], Any]:
        return lambda: next(Planner(SyntheticSource(count), 64, seed=0).tasks(Position()))

    laps = take_turns({str(count): work(count) for count in options.pictures}, options.rounds)
    return [lap.summary("cpu").median for lap in laps.values()]


def _spread(options: argparse.Namespace, count: int) -> float:
    """Forward passes a second of several processes of one thread, all together, by the wall clock."""
    dtype = str(options.torch_dtype).removeprefix("torch.")
    command = [sys.executable, "-c", _PROCESS, options.preset, str(options.seconds), options.device, dtype]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    try:
        for process in processes:
            if process.stdout is None or process.stdout.readline().strip() != "ready":
                raise InputError("A process of the benchmark did not start.")
        # All are told before any is waited for.
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("go\n")
                process.stdin.flush()
        return sum(float(process.communicate()[0]) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def draw(report: dict[str, Any], path: Path) -> None:
    """Five small charts in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.9), layout="constrained")
    labels = {
        "picture size": "pixels a side",
        "tokens": "tokens",
        "batch": "pictures at once",
        "pictures": "pictures in the data set",
        "processes": "processes of one thread",
    }
    for axes, name in zip(figure.subplots(1, len(_CHARTS)), _CHARTS, strict=True):
        axes.set_xlabel(labels[name])
        axes.grid(alpha=0.3)
        if name == "processes":
            x, y = report["processes"]["x"], report["processes"]["y"]
            axes.plot(x, y, "o-", label="measured")
            axes.plot(x, [y[0] * count / x[0] for count in x], "k--", lw=1, label="ideal")
            axes.set_title("pictures/s, wall clock", fontsize=9)
            axes.set_xticks(x)
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8)
            continue
        curve = report["curves"][name]
        axes.plot(curve["x"], [1e3 * value for value in curve["y"]], "o-")
        what = "until the first batch" if name == "pictures" else "a forward pass"
        axes.set_title(f"ms {what}", fontsize=9)
        if name == "pictures":
            axes.set_xscale("log")
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    write_atomic(path, functools.partial(figure.savefig, dpi=110, format="png"))


def show(report: dict[str, Any]) -> str:
    """The numbers behind the charts."""
    lines = [f"{report['preset']}, {report['clock']} time; picture in {report['picture']}"]
    for name, curve in report["curves"].items():
        points = ", ".join(f"{x}: {1e3 * y:.3g} ms" for x, y in zip(curve["x"], curve["y"], strict=True))
        lines.append(f"{name}: {points}")
    processes = report["processes"]
    points = ", ".join(f"{x}: {y:.3g}/s" for x, y in zip(processes["x"], processes["y"], strict=True))
    return "\n".join([*lines, f"processes: {points}"])
