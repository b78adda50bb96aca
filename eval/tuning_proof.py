"""Both stages of tuning on real material, under every engine, killed and resumed, and asked questions.

python -m eval.tuning_proof --data DATA --encoder ENCODER_DIR --out runs/real_tuning

DATA holds `lcs_558k_sample` (chat.json, images), `daquar` (data_train.csv, data_eval.csv, images) and
`babyllama`. Everything runs on the CPU: one process without a launcher, and two under `deepspeed` with ZeRO-2
and ZeRO-3. A leg that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.answers import InputError
from eval.config import BenchmarkSettings, RunSettings
from eval.provenance import describe_origin
from eval.run import run
from eval.task import BARE
from eval.to_chat import main as to_chat
from llm_integration.assemble import assemble
from sparse_vlm.atomic import write_atomic

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("plain", "zero2", "zero3")
PROCESSES = 2
TOLERANCE = 2e-3  # of a loss: what fp32 sums in another order may differ by after a few hundred steps


def command(engine: str, config: str, words: Sequence[str], batch: int) -> list[str]:
    """The command line of one training run; all engines see the same global batches.

    Args:
        engine: One of `ENGINES`.
        config: A file of configs/llm.
        words: `key.sub=value`.
        batch: Conversations a step of all processes together.
    """
    settings = [f"configs/llm/{config}.yaml", *words]
    if engine == "plain":
        return [sys.executable, "-m", "llm_integration.train", *settings, f"batch={batch}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(PROCESSES)),
        *("--master_port", str(port), "--module", "llm_integration.train", *settings),
        *(f"batch={batch // PROCESSES}", f"deepspeed=configs/deepspeed/{engine}.json"),
    ]


def train(
    engine: str, config: str, words: Sequence[str], batch: int, out: Path, kill_at: int | None = None
) -> None:
    """Runs one leg to its end, or kills it (SIGKILL, all its processes) once a step is in its log.

    Args:
        engine: One of `ENGINES`.
        config: A file of configs/llm.
        words: `key.sub=value`, `out` aside.
        batch: Conversations a step of all processes together.
        out: The run's folder; `out.log` beside it takes what the run prints.
        kill_at: The step.

    Raises:
        InputError: If it failed, or ended before it could be killed.
    """
    if (out / "final" / "run.json").is_file():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }  # fmt: skip
    log = out.with_suffix(".log")
    print(f"{out.name} under {engine} …", file=sys.stderr, flush=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            command(engine, config, [*words, f"out={out}"], batch),
            stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                if kill_at is not None and max(read_losses(out), default=0) >= kill_at:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode or kill_at is not None:
        raise InputError(f"{out.name} under {engine} ended with status {process.returncode}; see {log}.")


def read_losses(run_folder: Path) -> dict[int, float]:
    """Loss by step from a run's log; of a step that was run twice, the second time."""
    path = run_folder / "log.jsonl"
    if not path.is_file():
        return {}
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a kill cut off
        if "loss" in entry:
            losses[int(entry["step"])] = float(entry["loss"])
    return losses


def largest_difference(left: dict[int, float], right: dict[int, float]) -> float:
    """Of two runs' losses, step by step.

    Raises:
        InputError: If they do not have the same steps.
    """
    if left.keys() != right.keys() or not left:
        raise InputError(f"The runs logged other steps: {sorted(left)} and {sorted(right)}.")
    return max(abs(left[step] - right[step]) for step in left)


def ask(model: Path, data: Path, out: Path, floor: Any, limit: int | None) -> dict[str, Any]:
    """Accuracy on DAQUAR's evaluation questions: value, interval and n."""
    files = BenchmarkSettings("daquar", data / "daquar" / "data_eval.csv", images=data / "daquar" / "images")
    settings = RunSettings(
        model, files, out, BARE, floor, batch=32, max_new_tokens=24, limit=limit, device="cpu"
    )
    outcome = run(settings)
    assert outcome is not None
    figure = outcome.figures["accuracy"]
    return {"value": figure.value, "low": figure.low, "high": figure.high, "n": figure.n}


def prove(options: argparse.Namespace) -> dict[str, Any]:
    """Runs whatever is not finished yet, and returns all figures.

    Raises:
        InputError: If something fails.
    """
    out, data = options.out, options.data
    out.mkdir(parents=True, exist_ok=True)
    llava, chat = out / "llava", out / "daquar.json"
    daquar, sample = data / "daquar", data / "lcs_558k_sample"
    if not chat.is_file():
        words = ["--questions", str(daquar / "data_train.csv"), "--images", str(daquar / "images")]
        if to_chat(["--task", "daquar", *words, "--protocol", BARE, "--turns", "3", "--out", str(chat)]):
            raise InputError(f"DAQUAR's questions could not be read from {daquar}.")
    if not (llava / "config.json").is_file():
        assemble(options.encoder, str(options.llm or data / "babyllama"), llava, template="chatml")
    stages = {
        "align": ["real_align", llava, sample / "chat.json", sample / "images", options.align_steps],
        "tune": ["real_tune", out / "align_zero2" / "final", chat, daquar / "images", options.tune_steps],
    }
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for stage, (config, model, records, pictures, steps) in stages.items():
        words = [
            f"model={model}", f"data.records=[{records}]", f"data.pictures={pictures}", f"max_steps={steps}",
            f"checkpoint_every={max(1, steps // 3)}", f"log_every={max(1, steps // 12)}",
        ]  # fmt: skip
        for engine in ENGINES:
            train(engine, config, words, options.batch, out / f"{stage}_{engine}")
        losses[stage] = {engine: read_losses(out / f"{stage}_{engine}") for engine in ENGINES}
    # `words` are those of the second stage now.
    killed = out / "tune_zero3_killed"
    if not (killed / "checkpoints").is_dir():
        train("zero3", "real_tune", words, options.batch, killed, kill_at=options.tune_steps // 2)
    train("zero3", "real_tune", words, options.batch, killed)
    losses["tune"]["zero3, killed and resumed"] = read_losses(killed)
    asked = {
        name: ask(out / "tune_zero2" / "final", data, out / f"daquar_{name}", floor, options.questions)
        for name, floor in (("picture", "none"), ("no_image", "no-image"))
    }
    differences = {
        f"{stage}: {name}": largest_difference(runs["plain"], runs[name])
        for stage, runs in losses.items()
        for name in runs
        if name != "plain"
    }
    return {"losses": losses, "differences": differences, "daquar": asked}


def format_report(report: dict[str, Any]) -> str:
    """Losses by step and engine, differences, and DAQUAR's accuracy, in Markdown."""
    lines = []
    for stage, runs in report["losses"].items():
        lines += [f"| {stage}: step | {' | '.join(runs)} |", "|---" * (len(runs) + 1) + "|"]
        for step in runs["plain"]:
            lines.append(f"| {step} | {' | '.join(f'{run[step]:.5f}' for run in runs.values())} |")
        lines.append("")
    lines += [
        f"Largest difference from plain, {name}: {gap:.1e}" for name, gap in report["differences"].items()
    ]
    for name, figure in report["daquar"].items():
        lines.append(
            f"DAQUAR accuracy, {name}: {figure['value']:.2f} % [{figure['low']:.2f}, {figure['high']:.2f}], "
            f"n = {figure['n']}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 1 if the engines' losses do not agree."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m eval.tuning_proof", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the real material")
    parser.add_argument("--encoder", type=Path, required=True, help="encoder directory")
    parser.add_argument("--llm", type=Path, help="causal language model (default: babyllama of --data)")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and of the report")
    parser.add_argument("--batch", type=int, default=16, help="conversations a step (default 16)")
    parser.add_argument("--align-steps", type=int, default=60)
    parser.add_argument("--tune-steps", type=int, default=240)
    parser.add_argument("--questions", type=int, help="ask only so many evaluation questions")
    options = parser.parse_args(words)
    for name in ("data", "encoder", "out", "llm"):
        value = getattr(options, name)
        setattr(options, name, value and value.resolve())
    try:
        if options.batch % PROCESSES or min(options.batch, options.align_steps, options.tune_steps - 5) < 1:
            raise InputError(f"--batch must be a multiple of {PROCESSES}; --tune-steps at least 6.")
        settings = {key: str(value) for key, value in vars(options).items()}
        origin = describe_origin("eval.tuning_proof", words, settings, "cpu")  # before anything else changes
        report = prove(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report["provenance"] = origin
    write_atomic(options.out / "report.json", json.dumps(report, indent=1, default=str) + "\n")
    print(format_report(report))
    apart = {name: gap for name, gap in report["differences"].items() if gap > TOLERANCE}
    if apart:
        print(f"error: losses differ by more than {TOLERANCE}: {apart}", file=sys.stderr)
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(main())
