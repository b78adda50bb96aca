"""The training step in plain view, and what happens around it every so often."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_vlm.preemption import StoppedError, StopRequest

from .config import BootstrapConfig
from .data import PictureBatch, PictureStream
from .distributed import TorchEngine
from .log import RunLog
from .optim import WeightAverage, schedule, set_learning_rate
from .student import Student, weigh
from .targets import TargetSource


@dataclass
class Run:
    """Everything a training loop needs, prepared by :mod:`bootstrap.train`.

    Attributes:
        config: the run's settings.
        engine: one process or many.
        student: the encoder and its distances.
        optimiser: updates the weights.
        targets: the teacher, or what it said before.
        stream: batches of views.
        average: moving average of the weights, or None.
        log: progress bar, JSONL, TensorBoard.
        step: steps done.
        every: called after each step with the number of steps done, and whether the run ends there because it
            was asked to: evaluation, figures, checkpoints.
        stop: whether the run is asked to end.
    """

    config: BootstrapConfig
    engine: TorchEngine
    student: Student
    optimiser: torch.optim.Optimizer
    targets: TargetSource
    stream: PictureStream
    average: WeightAverage | None
    log: RunLog
    step: int
    every: Callable[[int, bool], None]
    stop: StopRequest


def run_loop(run: Run) -> None:
    """Train from ``run.step`` to the last step.

    Raises:
        FloatingPointError: if loss or gradients are no longer numbers; nothing is written after that.
        StoppedError: if it was asked to end, after a checkpoint. Several processes have to agree, which they
            do when they log.
    """
    config, engine = run.config, run.engine
    warmup = round(config.objective.warmup * config.steps)
    run.student.train()
    batches = iter(run.stream)
    waited = 0.0
    for step in range(run.step, config.steps):
        # --- one step -------------------------------------------------------------------------------------
        warming_up = step < warmup
        progress = 0.0 if warming_up else (step - warmup) / max(1, config.steps - warmup)
        rate = schedule(step, config.steps, config.optimiser)
        set_learning_rate(run.optimiser, rate if warming_up else rate * config.optimiser.joint_lr)
        engine.rest(warming_up, first_after=step == warmup)
        totals: dict[str, Tensor] = {}
        for micro in range(config.accumulate):
            batch, seconds = _next(batches)
            waited += seconds
            images = batch.images.to(engine.device, non_blocking=True)
            targets = run.targets(batch, images, warming_up)
            with engine.accumulating(last=micro == config.accumulate - 1):
                distances = engine.forward(images, targets, draw_count(config, step))
                loss = weigh(distances, config.objective, progress)
                engine.backward(loss)
            for name, value in {**distances, "loss": loss}.items():
                totals[name] = totals.get(name, 0) + value.detach() / config.accumulate
        totals["gradient_norm"] = engine.step()
        if run.average is not None:
            run.average.update(run.student.encoder.named_parameters())
        # --- now and then ---------------------------------------------------------------------------------
        done = step + 1
        pictures = config.batch_size * config.accumulate * engine.world_size
        run.log.advance(pictures)
        logs = done % config.log_every == 0 or done == config.steps
        others = (config.save_every, config.heldout.every)
        stops = run.stop.asked and engine.world_size == 1
        if logs or stops or any(every > 0 and done % every == 0 for every in others):
            # The one place where the loop waits for the device.
            own = {name: float(value) for name, value in totals.items()}
            # Each process has seen pictures of its own.
            skipped = run.stream.skipped
            told = engine.gather((own, (skipped.seen, skipped.total), run.stop.asked))
            parts = [figures for figures, _, _ in told]
            skipped.check_all([tally for _, tally, _ in told])
            stops = any(asked for _, _, asked in told)
            figures = {name: sum(part[name] for part in parts) / len(parts) for name in own}
            # Before a checkpoint too, which would keep what is broken, and before an evaluation.
            _check_finite(figures, done, engine)
            _check_weights(run.student, done, engine)
            if logs:
                figures["lr"] = run.optimiser.param_groups[0]["lr"]
                figures["waited_for_data_s"] = waited
                run.log.write(done, figures)
                waited = 0.0
        run.every(done, stops)
        if stops and done < config.steps:
            engine.gather(None)  # launchers end all processes soon after one has left: the first one writes
            raise StoppedError(f"stopped after step {done}, as it was asked to")


def draw_count(config: BootstrapConfig, step: int) -> int | None:
    """The token count of a step: a function of seed and step, so a resumed run draws the same."""
    counts = config.student.token_counts
    if not counts:
        return None
    return counts[int(np.random.default_rng([config.seed, step]).integers(len(counts)))]


def _next(batches: Iterator[PictureBatch]) -> tuple[PictureBatch, float]:
    started = time.perf_counter()
    return next(batches), time.perf_counter() - started


def _check_weights(student: Student, done: int, engine: TorchEngine) -> None:
    # Where the engine tells no norm, weights show it before the loss does, and before they are kept.
    if engine.keeps_optimiser:
        return
    whole = [value.detach().isfinite().all() for value in student.encoder.parameters() if value.requires_grad]
    if whole and not bool(torch.stack(whole).all()):
        raise FloatingPointError(
            f"weights are no longer numbers at step {done}: lower optimiser.lr or optimiser.clip_norm and "
            "start anew; the last checkpoint is from before"
        )


def _check_finite(figures: dict[str, float], done: int, engine: TorchEngine) -> None:
    # A gradient that is no number spoils the weights one step before the loss shows it. DeepSpeed's engine
    # does not always have a norm to tell.
    for name in ("loss", "gradient_norm") if engine.keeps_optimiser else ("loss",):
        if not math.isfinite(figures[name]):
            broken = {key: value for key, value in figures.items() if not math.isfinite(value)}
            listed = ", ".join(f"{key} {value:.3g}" for key, value in broken.items())
            raise FloatingPointError(
                f"the {name.replace('_', ' ')} is {figures[name]} at step {done} ({listed}): lower "
                "optimiser.lr or optimiser.clip_norm and start anew; the last checkpoint is from before this "
                "step"
            )
