"""A bootstrap training step, against a straightforward teacher-and-student loop, in turn in one process."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bootstrap.config import ObjectiveSettings, OptimiserSettings
from bootstrap.data import PictureBatch, TrainView
from bootstrap.muon import has_muon
from bootstrap.optim import build_optimiser
from bootstrap.student import Student, Targets, weigh
from bootstrap.targets import LiveTargets, StoredTargets, measure_spreads
from bootstrap.teacher import Teacher, inherit_teacher, spec_to_config
from bootstrap.teachers.hf_vit import HfTrunk
from eval.answers import InputError
from eval.bench.data import make_photograph, plain_view
from eval.bench.turns import Laps, format_spread, has_bf16, ratio, table, take_turns
from eval.costs.clock import Timing
from eval.costs.shapes import list_towers
from sparse_vlm import SparseFormer, build_encoder
from sparse_vlm.inherit import InheritPlan
from sparse_vlm.presets import load_preset

PLAIN = "straightforward loop"
WARMUP, LIVE, STORED = "ours, warm-up", "ours, live teacher", "ours, stored targets"
HALF, COMPILED = ", bf16", ", compiled"
ADAMW, MUON = "AdamW", "Muon and AdamW"
_TEACHERS = ("vit_b_16", "vit_l_14")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m eval.bench training`."""
    parser.add_argument("--teacher", choices=_TEACHERS, default="vit_b_16", help="shape of the teacher")
    parser.add_argument("--batch", type=int, default=4, help="pictures in a step (default 4)")
    parser.add_argument("--jpeg", default="640x480", help="WIDTHxHEIGHT of the pictures (default 640x480)")
    parser.add_argument(
        "--decoded",
        action="store_true",
        help="pictures are decoded beforehand, for both loops: a run's loader processes do that",
    )
    parser.add_argument("--compile", action="store_true", help="our student compiled, too (minutes)")
    parser.add_argument(
        "--steps", type=int, default=1, help="steps in a row, waited for once behind the last, as a run does"
    )
    parser.add_argument("--warmup", type=float, default=0.2, help="share of warm-up steps (default 0.2)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times one step of each loop, decoding included unless asked otherwise.

    Raises:
        InputError: If a setting makes no sense.
    """
    width, _, height = options.jpeg.partition("x")
    sensible = min(options.batch, options.steps) >= 1 and 0 <= options.warmup <= 1
    if not (sensible and width.isdigit() and height.isdigit()):
        raise InputError(
            "--batch and --steps are at least 1, --warmup a share from 0 to 1, --jpeg WIDTHxHEIGHT."
        )
    photograph = make_photograph(int(width), int(height))
    teacher = build_teacher(options.teacher).to(options.device, options.torch_dtype)
    plan = InheritPlan.thirds(teacher.spec.depth, None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        steps = _build_steps(teacher, plan, photograph, Path(folder), options)
        updates = _build_updates(teacher, plan)
        rows = {name: _repeat(step, options.steps) for name, step in steps.items()}
        laps = take_turns(rows | updates, options.rounds, options.device)
    report: dict[str, Any] = {"teacher": options.teacher, "batch": options.batch, "steps": {}}
    report["decoding"], report["steps_in_a_row"] = not options.decoded, options.steps
    report["updates"] = {
        name: {clock: vars(laps[name].summary(clock)) for clock in ("wall", "cpu")} for name in updates
    }
    for name in steps:
        lap = laps[name]
        report["steps"][name] = {
            clock: {
                **vars(_divide(lap.summary(clock), options.steps)),
                "pictures_a_second": options.batch * options.steps / lap.summary(clock).median,
                "times_faster": vars(ratio(laps[PLAIN], lap, clock)),
            }
            for clock in ("wall", "cpu")
        }
    report["whole_run"] = _whole_run(laps, options.warmup, "")
    if STORED + HALF in laps:
        report["whole_run_bf16"] = _whole_run(laps, options.warmup, HALF)
    if STORED + COMPILED in laps:
        report["whole_run_compiled"] = _whole_run(laps, options.warmup, COMPILED)
    report["warmup"] = options.warmup
    return report


def _divide(timing: Timing, steps: int) -> Timing:
    return replace(timing, **{name: getattr(timing, name) / steps for name in ("median", "low", "high")})


def _repeat(step: Callable[[], Any], times: int) -> Callable[[], Any]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def _whole_run(laps: dict[str, Laps], warmup: float, precision: str) -> dict[str, float]:
    """How many times faster a run is that warms up on the hand-over alone and then meets stored targets."""
    return {
        clock: laps[PLAIN].summary(clock).median
        / (
            warmup * laps[WARMUP + precision].summary(clock).median
            + (1 - warmup) * laps[STORED + precision].summary(clock).median
        )
        for clock in ("wall", "cpu")
    }


def build_teacher(shape: str) -> Teacher:
    """A frozen CLIP image side of a published shape with random weights."""
    from transformers import CLIPVisionModelWithProjection

    model: Any = CLIPVisionModelWithProjection(list_towers()[shape].config)
    return Teacher(HfTrunk(model.eval(), shape, load_preset("sparseformer_btsp_openai_clip_base")[1]))


def _build_student(teacher: Teacher, plan: InheritPlan, objective: ObjectiveSettings) -> Student:
    encoder = build_encoder(spec_to_config(teacher.spec, plan.drop), teacher.spec.transform)
    inherit_teacher(encoder, teacher, plan)
    spreads, _ = measure_spreads(teacher, plan.drop, [torch.randn(2, 3, 224, 224, device=teacher.device)])
    return Student(encoder, objective, spreads, teacher.spec.grid).to(teacher.device)


def _build_steps(
    teacher: Teacher, plan: InheritPlan, photograph: bytes, folder: Path, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    objective = ObjectiveSettings()
    student = _build_student(teacher, plan, objective)
    optimiser = build_optimiser(student.encoder, OptimiserSettings())
    live = LiveTargets(teacher, plan.drop)
    stored = StoredTargets(live, folder, options.batch, 1, {"teacher": options.teacher}, 1.0)
    read = _reader(TrainView(teacher.spec.transform), photograph, options)
    numbers = torch.arange(options.batch)

    def ours(
        source: Callable[..., Targets],
        warming_up: bool,
        half: bool = options.dtype == "bf16",
        look: Callable[..., dict[str, Tensor]] = student,
    ) -> None:
        images = read()
        batch = PictureBatch(images, numbers, torch.zeros_like(numbers), ("",) * options.batch)
        images = images.to(options.device, non_blocking=True)
        targets = source(batch, images, warming_up)
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, half):
            loss = weigh(look(images, targets), objective, 0.5)
        loss.backward()
        nn.utils.clip_grad_norm_(student.encoder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    steps: dict[str, Callable[[], Any]] = {
        PLAIN: plain_step(teacher, student.encoder, photograph, options),
        WARMUP: lambda: ours(live, True),
        LIVE: lambda: ours(live, False),
        STORED: lambda: ours(stored, False),  # the uncounted first round fills the store
    }
    if options.compile:
        compiled: Callable[..., dict[str, Tensor]] = torch.compile(student)
        steps[WARMUP + COMPILED] = lambda: ours(live, True, look=compiled)
        steps[LIVE + COMPILED] = lambda: ours(live, False, look=compiled)
        steps[STORED + COMPILED] = lambda: ours(stored, False, look=compiled)
    if options.dtype == "fp32" and has_bf16(options.device):
        rough = LiveTargets(copy.deepcopy(teacher).to_bf16(), plan.drop)
        steps[WARMUP + HALF] = lambda: ours(rough, True, half=True)
        steps[LIVE + HALF] = lambda: ours(rough, False, half=True)
        steps[STORED + HALF] = lambda: ours(stored, False, half=True)
    return steps


def _build_updates(teacher: Teacher, plan: InheritPlan) -> dict[str, Callable[[], Any]]:
    """The optimisers' own work in a step, which does not depend on the number of pictures."""
    kinds = {ADAMW: OptimiserSettings()}
    if has_muon():
        kinds[MUON] = OptimiserSettings(muon_lr=1e-3)
    updates: dict[str, Callable[[], Any]] = {}
    for name, settings in kinds.items():
        student = _build_student(teacher, plan, ObjectiveSettings())
        for parameter in student.encoder.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        updates[name] = build_optimiser(student.encoder, settings).step
    return updates


def _reader(
    view: Callable[..., Tensor], photograph: bytes, options: argparse.Namespace
) -> Callable[[], Tensor]:
    """Makes a step's pictures, (B, 3, H, W), or hands out the same ones, in memory that a GPU reads fast."""

    def read() -> Tensor:
        return torch.stack([view(photograph, index, 0) for index in range(options.batch)])

    if not options.decoded:
        return read
    images = read().pin_memory() if options.device.startswith("cuda") else read()
    return lambda: images


def plain_step(
    teacher: Teacher, like: SparseFormer, photograph: bytes, options: argparse.Namespace
) -> Callable[[], Any]:
    """What one writes first: decode whole pictures, ask the whole teacher, train every weight.

    Args:
        teacher: asked for its pooled embedding at every step.
        like: the student's architecture.
        photograph: the JPEG.
        options: batch, device, dtype, and whether pictures are decoded beforehand.
    """
    encoder = build_encoder(like.config, teacher.spec.transform).to(options.device)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    read = _reader(plain_view(TrainView(teacher.spec.transform)), photograph, options)

    def step() -> float:
        images = read().to(options.device)
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, options.dtype == "bf16"):
            wanted: Any = teacher(images).pooled
            distance: Tensor = 1 - nn.functional.cosine_similarity(encoder(images).pooled, wanted).mean()
        optimiser.zero_grad()
        distance.backward()
        optimiser.step()
        return distance.item()

    return step


def show(report: dict[str, Any]) -> str:
    """Pictures per second and how many times faster than the straightforward loop."""
    clock = "cpu" if report["provenance"]["device"].startswith("CPU") else "wall"
    rows = [
        [
            name,
            f"{1e3 * row[clock]['median']:.0f}",
            f"{row[clock]['pictures_a_second']:.2f}",
            format_spread(Timing(**row[clock]["times_faster"])),
        ]
        for name, row in report["steps"].items()
    ]
    whole = f"{report['whole_run'][clock]:.2f}x"
    if "whole_run_bf16" in report:
        whole += f", in bf16 {report['whole_run_bf16'][clock]:.2f}x"
    if "whole_run_compiled" in report:
        whole += f", compiled {report['whole_run_compiled'][clock]:.2f}x"
    decoding = "decoding included" if report["decoding"] else "decoded beforehand"
    if report["steps_in_a_row"] > 1:
        decoding += f", {report['steps_in_a_row']} steps in a row"
    return (
        f"Teacher {report['teacher']}, {report['batch']} pictures a step, {decoding}; {clock} time.\n"
        + table(["step", "ms", "pictures/s", "times faster"], rows)
        + "\nThe optimiser's own part of a step, whatever the number of pictures: "
        + ", ".join(f"{name} {1e3 * one[clock]['median']:.0f} ms" for name, one in report["updates"].items())
        + "."
        + f"\nA run with {report['warmup']:.0%} warm-up and targets that were stored before: {whole}."
    )
