"""Bootstrap a SparseFormer from a ViT: ``python -m bootstrap.train CONFIG.yaml key.sub=value …``.

The same under ``torchrun -m bootstrap.train`` and ``deepspeed --module bootstrap.train`` for many GPUs. A run
that was stopped, however rudely, goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from sparse_vlm.atomic import write_atomic
from sparse_vlm.checkpoint import build_encoder, load_encoder
from sparse_vlm.encoder import SparseFormer
from sparse_vlm.fingerprint import hash_tower
from sparse_vlm.inherit import InheritPlan, freeze
from sparse_vlm.preemption import StoppedError, StopRequest
from sparse_vlm.settings import SettingsError, build_settings, expand_home, settings_to_dict

from .config import BootstrapConfig, read_config
from .data import AnySource, PictureSource, PictureStream, build_stream, check_outside
from .distributed import TorchEngine, build_engine, is_left_behind
from .evaluate import HeldOut, draw_focus
from .figures import describe_end, format_figures
from .lock import LOCK_FILE, lock_directory
from .log import RunLog
from .loop import Run, run_loop
from .memory import keep_freed_memory
from .optim import WeightAverage, averaged, build_optimiser
from .provenance import describe_commit, describe_device, describe_versions
from .state import (
    list_checkpoints,
    load_resumed_encoder,
    load_spreads,
    load_state,
    save_state,
    write_json,
)
from .student import Spreads, Student
from .targets import LiveTargets, StoredTargets, TargetSource, measure_spreads
from .teacher import check_architecture, hash_teacher, inherit_teacher, load_teacher, spec_to_config

# Pictures that units and the class token's first state are measured on.
_MEASURED_PICTURES = 256
_SETTINGS_FILE, _INHERITANCE_FILE = "config.yaml", "inheritance.txt"
# Settings that a resumed run may change: they decide nothing about the weights, but for the rounding of
# targets that are stored.
_FREE = (
    *("out.", "log_every.", "save_every.", "keep_checkpoints.", "figure.", "heldout.", "targets.", "device."),
    *("data.workers.", "data.max_bad_share."),
)


def bootstrap(config: BootstrapConfig) -> Path:
    """Run a bootstrap to its end.

    Args:
        config: the settings.

    Returns:
        The encoder directory.

    Raises:
        ValueError: if settings, teacher, data or an earlier run in the same place do not fit.
        FloatingPointError: if the loss is no longer a number.
        OSError: if something cannot be read or written.
    """
    out = Path(config.out)
    engine = build_engine(config)
    try:
        if engine.is_main:
            _check_place(out, config)
        if (out / "encoder" / "config.json").is_file():
            if engine.is_main:
                print(f"this run is finished: {out / 'encoder'}", file=sys.stderr)
            return out / "encoder"
        with ExitStack() as stack:
            if engine.is_main:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_directory(out))
                _warn_of_warmup(config)
                _warn_of_bf16(config, engine.device)
                settings = yaml.safe_dump(_to_plain(config), sort_keys=False)
                write_atomic(out / _SETTINGS_FILE, settings)
            engine.gather(None)
            return _Bootstrap(config, out, engine).run()
    finally:
        engine.close()


class _Bootstrap:
    """One run, from settings to encoder directory."""

    def __init__(self, config: BootstrapConfig, out: Path, engine: TorchEngine) -> None:
        self.config, self.out, self.engine = config, out, engine
        self.commit = describe_commit()  # of the code that runs: the checkout may move on meanwhile
        self.checkpoints = out / "checkpoints"
        torch.manual_seed(config.seed)
        # In fp32 until its weights are named and inherited and the held-out pictures are judged.
        self.teacher = load_teacher(config.teacher.name, config.teacher.weights, engine.device)
        weights = self.teacher.vision_state_dict()
        self.tower_hash, self.teacher_hash = hash_tower(weights), hash_teacher(weights)
        student = config.student
        self.plan = InheritPlan.thirds(self.teacher.spec.depth, student.drop, student.tune, student.freeze)
        self.stream = self._open_stream(engine.rank, engine.world_size, None)
        if config.heldout.source is not None:
            check_outside(out, self.stream.source)
        checkpoints = list_checkpoints(self.checkpoints)
        self.resumed = checkpoints[-1] if checkpoints else None
        # Workers draw a seed of their own: how many there are must not be in the weights.
        with torch.random.fork_rng(devices=[]):
            self.spreads, cls_state = self._measure()
        self.encoder = self._build_encoder(cls_state).to(engine.device)
        self._check_counts()
        self.encoder.set_grad_checkpointing(student.activation_checkpointing)
        self.optimiser = build_optimiser(self.encoder, config.optimiser)
        self.student = Student(self.encoder, config.objective, self.spreads, self.teacher.spec.grid)
        self.student.to(engine.device)
        if student.compile:
            self.student.compile()
        self.average = (
            WeightAverage(self.encoder.named_parameters(), config.optimiser.ema)
            if config.optimiser.ema
            else None
        )
        engine.wrap(self.student, self.optimiser)
        self.step = 0
        if self.resumed is not None:
            self.step = load_state(
                self.resumed, self.encoder, engine, self.stream, self.average, self.teacher_hash
            )
        heldout = config.heldout.source is not None and engine.is_main
        training = self.stream.source
        workers = config.data.workers
        self.heldout = HeldOut(config.heldout, self.teacher, training, workers) if heldout else None
        # Looked at once before hours of training, not only after them.
        self.picture = self.heldout.picture(config.figure) if self.heldout is not None else None
        if config.teacher.precision == "bf16":
            self.teacher.to_bf16()
        pictures = self._pictures_a_step
        self.log = RunLog(out, config.steps * pictures, self.step * pictures, self.step, engine.is_main)

    @property
    def _pictures_a_step(self) -> int:
        return self.config.batch_size * self.config.accumulate * self.engine.world_size

    @property
    def _is_compared(self) -> bool:
        """Whether the pooled embedding is held against the teacher's."""
        weights = self.config.objective
        asked = (weights.pooled, weights.pooled_cosine, weights.relations, self.config.heldout.source)
        return any(asked)

    def run(self) -> Path:
        """Train, evaluate, and write the encoder directory."""
        started = time.time()
        if self.step:
            self.log.say(f"going on from {self.resumed} (step {self.step})")
        try:
            if self._is_evaluated_after(self.step) and not self.log.has("heldout", self.step):
                self._evaluate(self.step)  # what ended the run before came between checkpoint and figures
            with StopRequest() as stop:
                run_loop(
                    Run(
                        self.config,
                        self.engine,
                        self.student,
                        self.optimiser,
                        self._build_targets(),
                        self.stream,
                        self.average,
                        self.log,
                        self.step,
                        self._every,
                        stop,
                    )
                )
            return self._finish(time.time() - started)
        finally:
            self.log.close()

    def _open_stream(self, rank: int, world_size: int, source: AnySource | None) -> PictureStream:
        config = self.config
        return build_stream(
            config.data,
            self.teacher.spec.transform,
            config.batch_size,
            rank,
            world_size,
            source,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _measure(self) -> tuple[Spreads, torch.Tensor | None]:
        """Units of the distances, from the run's first pictures, the same on every process."""
        if self.resumed is not None:
            return load_spreads(self.resumed), None
        batches: list[torch.Tensor] = []
        for batch in self._open_stream(0, 1, self.stream.source):  # millions of files are not listed twice
            batches.append(batch.images.to(self.engine.device))
            if sum(map(len, batches)) >= _MEASURED_PICTURES:
                break
        return measure_spreads(self.teacher, self.plan.drop, batches)

    def _build_encoder(self, cls_state: torch.Tensor | None) -> SparseFormer:
        start_from = self.config.student.start_from
        if start_from is not None:
            # Where a run started may be gone, or another's, when it goes on.
            encoder = load_resumed_encoder(self.resumed) if self.resumed is not None else None
            if encoder is None:
                encoder = load_encoder(start_from, dtype=torch.float32)  # whatever it was saved in
            if not encoder.transform.config.prepares_like(self.teacher.spec.transform):
                raise ValueError(
                    f"student.start_from={start_from}: the encoder prepares pictures another way "
                    f"({encoder.transform.config}) than the teacher {self.teacher.spec.name} "
                    f"({self.teacher.spec.transform}), so it would be trained on what it never sees in use"
                )
            source = f"student.start_from={start_from}"
            check_architecture(encoder.config, self.teacher.spec, self.plan.drop, source, self._is_compared)
            freeze(encoder, self.plan)
            return encoder
        spec = self.teacher.spec
        architecture = spec_to_config(spec, self.plan.drop, **self.config.student.architecture)
        check_architecture(architecture, spec, self.plan.drop, "student.architecture", self._is_compared)
        encoder = build_encoder(architecture, spec.transform)
        report = inherit_teacher(encoder, self.teacher, self.plan, cls_state)
        if self.engine.is_main and self.resumed is None:  # weights of a checkpoint take their place otherwise
            write_atomic(self.out / _INHERITANCE_FILE, report.table(every_tensor=True) + "\n")
            print(report, file=sys.stderr)
        return encoder

    def _check_counts(self) -> None:
        """See that the encoder runs with every token count that the settings name."""
        settings = (
            ("student.token_counts", self.config.student.token_counts),
            ("heldout.tokens", self.config.heldout.tokens),
        )
        for key, counts in settings:
            for count in counts:
                try:
                    self.encoder.check_tokens(count)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None

    def _build_targets(self) -> TargetSource:
        live = LiveTargets(self.teacher, self.plan.drop)
        settings, data = self.config.targets, self.config.data
        if settings.store is None:
            return live
        source = self.stream.source
        if not isinstance(source, PictureSource):
            raise ValueError("targets.store needs pictures with random access, not streamed shards")
        made_for: dict[str, Any] = {
            "teacher_sha256": self.teacher_hash,
            "precision": self.config.teacher.precision,
            "transform": self.teacher.spec.transform.to_dict(),
            "source": source.fingerprint(),
            "max_pixels": data.max_pixels,
            "scale": list(data.scale),
            "ratio": list(data.ratio),
            "flip": data.flip,
            "seed": data.seed,
        }
        left = (self.config.steps - self.step) * self._pictures_a_step
        return StoredTargets(
            live, settings.store, len(source), data.views or 1, made_for, settings.max_gigabytes, left
        )

    def _every(self, done: int, stops: bool) -> None:
        config, last = self.config, done == self.config.steps
        # Saved first: whatever ends an evaluation must not take the steps before it along.
        if last or stops or (config.save_every and done % config.save_every == 0):
            save_state(
                self.checkpoints,
                done,
                self.encoder,
                self.engine,
                self.stream,
                self.average,
                self.spreads,
                config.keep_checkpoints,
                self.teacher_hash,
            )
        if self._is_evaluated_after(done) and not stops:  # the next start does it
            self._evaluate(done)

    def _is_evaluated_after(self, done: int) -> bool:
        every = self.config.heldout.every
        return every > 0 and done % every == 0 and 0 < done < self.config.steps

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Held-out figures, those of other token counts under ``by_tokens``, and a picture of the RoIs."""
        if self.heldout is None or self.picture is None:
            return {}
        with averaged(self.encoder, self.average):
            figures = self.heldout.score(self.encoder)
            if not math.isfinite(figures["cosine"]):
                raise FloatingPointError(
                    f"the encoder no longer says numbers about held-out pictures at step {step}: lower "
                    "optimiser.lr or optimiser.clip_norm and start anew"
                )
            by_tokens = {
                count: figures
                if count == self.encoder.config.num_tokens
                else self.heldout.score(self.encoder, count)
                for count in self.config.heldout.tokens
            }
            picture = draw_focus(self.encoder, self.picture)
        write_atomic(self.out / "figures" / f"rois_{step:08d}.png", picture.save)
        self.log.write(step, figures, kind="heldout")
        for count, scores in by_tokens.items():
            self.log.write(step, scores, kind=f"heldout_{count}_tokens")
        self.log.picture(step, picture)
        if step < self.config.steps:  # the last ones are in the table at the end
            self.log.say(f"step {step}: " + format_figures(figures))
        if by_tokens:
            return {**figures, "by_tokens": {str(count): scores for count, scores in by_tokens.items()}}
        return {**figures}

    def _finish(self, seconds: float) -> Path:
        if self.heldout is not None:
            self.log.say(f"comparing teacher and student on {len(self.heldout.kept)} held-out pictures")
        figures = self._evaluate(self.config.steps)
        directory = self.out / "encoder"
        if self.engine.is_main:
            with averaged(self.encoder, self.average):
                # The directory appears last: its being there says that the run is finished.
                write_json(self.out / "figures.json", figures)
                self.encoder.save(directory, self._describe(figures, seconds))
            self.log.close()
            print(describe_end(figures, self.encoder.config.num_tokens, self.out), file=sys.stderr)
        self.engine.gather(None)
        return directory

    def _describe(self, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
        config, engine = self.config, self.engine
        return {
            "made_by": "bootstrap.train",
            "teacher": {
                "name": config.teacher.name,
                "library": self.teacher.spec.library,
                "tower_sha256": self.tower_hash,
                "depth": self.teacher.spec.depth,
            },
            "blocks": {"drop": self.plan.drop, "tune": self.plan.tune, "freeze": self.plan.freeze},
            "data": {
                "source": config.data.source,
                "fingerprint": self.stream.source.fingerprint(),
                "skipped": self.stream.skipped.summary(),
            },
            "tokens": self.encoder.config.num_tokens,
            "steps": config.steps,
            "pictures_seen": config.steps * self._pictures_a_step,
            "seconds_since_last_start": round(seconds, 1),
            "device": describe_device(engine.device),
            "processes": engine.world_size,
            "seed": config.seed,
            "commit": self.commit,
            "packages": describe_versions(),
            "figures": figures,
            "config": settings_to_dict(config),
        }


def _to_plain(config: BootstrapConfig) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings_to_dict(config))))


def _check_place(out: Path, config: BootstrapConfig) -> None:
    """See that the run directory is empty, or that these are the settings of the run that was begun in it."""
    path, ours = out / _SETTINGS_FILE, _to_plain(config)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file: name a directory")
    if path.is_file():
        theirs = _read_settings(path)
        begun = {entry.name for entry in out.iterdir()} - {_SETTINGS_FILE, _INHERITANCE_FILE, LOCK_FILE}
        if not begun and theirs.keys() == ours.keys():
            return  # left by a start that failed before the first step
        left, right = _by_dotted_key(theirs), _by_dotted_key(ours)
        changed = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
        changed = [key for key in changed if not f"{key}.".startswith(_FREE)]
        if changed:
            raise ValueError(
                f"{out} holds a run with other settings ({', '.join(changed)}): resume it with its own, "
                f"{path}, or name another directory with out=…"
            )
    elif out.is_dir() and any(entry.name != LOCK_FILE for entry in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run: name another directory with out=…")


def _read_settings(path: Path) -> dict[str, Any]:
    """The resolved settings of an earlier start, with today's defaults for settings that came later."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged ({said}): put it back as it was, or name another directory with out=…"
        ) from None
    try:
        return _to_plain(build_settings(BootstrapConfig, found, source=path))
    except SettingsError:  # somebody else's file, or that of another release
        return dict(expand_home(found)) if isinstance(found, dict) else {}


def _by_dotted_key(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """``{"data": {"seed": 0}}`` as ``{"data.seed": 0}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        here = f"{above}{key}"
        flat |= _by_dotted_key(value, f"{here}.") if isinstance(value, dict) else {here: value}
    return flat


def _warn_of_warmup(config: BootstrapConfig) -> None:
    if config.optimiser.warmup_steps > config.steps:
        print(
            f"optimiser.warmup_steps={config.optimiser.warmup_steps} is more than steps={config.steps}: the "
            "learning rate ends before it has reached its peak",
            file=sys.stderr,
        )


def _warn_of_bf16(config: BootstrapConfig, device: torch.device) -> None:
    """On a processor without instructions for it bf16 takes longer than fp32."""
    asked = {"precision": config.precision, "teacher.precision": config.teacher.precision}
    named = [f"{key}=fp32" for key, value in asked.items() if value == "bf16"]
    asks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    known = [bool(ask()) for ask in asks if ask is not None]
    if named and device.type == "cpu" and known and not any(known):
        print(
            f"this processor has no instructions for bf16, in which it is slow: {' '.join(named)} is faster",
            file=sys.stderr,
        )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bootstrap.train", description="Bootstrap a SparseFormer from a vision transformer."
    )
    parser.add_argument("config", help="YAML file, for instance one of configs/bootstrap/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="settings on top of the file"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from launchers
    options = parser.parse_args(arguments)
    keep_freed_memory()
    config: BootstrapConfig | None = None
    try:
        config = read_config(options.config, tuple(options.overrides))
        directory = bootstrap(config)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"bootstrap: {error}") from None
    except RuntimeError as error:
        if not is_left_behind(error):
            raise
        rank = os.environ.get("RANK", "?")
        raise SystemExit(
            f"bootstrap: process {rank} stops because another one has ended; what that one says is the reason"
        ) from None
    except StoppedError as error:
        print(f"bootstrap: {error}; the same command goes on from there", file=sys.stderr)
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        if config is None:
            raise SystemExit(130) from None
        print(
            f"bootstrap: stopped; the same command goes on from the newest checkpoint in {config.out}, "
            "if there is one",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"encoder directory: {directory}", file=sys.stderr)


if __name__ == "__main__":
    main()
