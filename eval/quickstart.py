"""The language half of `make quickstart`: a small LLaVA on scenes, with all of a ViT's tokens and with 49.

python -m eval.quickstart

Assembles two LLaVAs from the small Llama in `assets/scenes_llama`, one around the teacher itself, one around
the SparseFormer that `python -m bootstrap.quickstart` has made of it; tunes both alike on scenes; asks both
the same questions about pictures whose combinations of shape and colour neither has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from eval.answers import InputError
from eval.compare import GROUPS, compare_records
from eval.config import BenchmarkSettings, RunSettings
from eval.rescore import Rescored
from eval.run import run
from eval.task import BARE
from llm_integration.assemble import ASSEMBLY_FILE, assemble
from llm_integration.config import TrainSettings, load_settings
from llm_integration.generate import build_message, load_chat, open_picture
from llm_integration.train import SETTINGS_FILE
from sparse_vlm.atomic import write_atomic
from sparse_vlm.checkpoint import load_provenance
from sparse_vlm.settings import settings_to_dict

_CONFIG = "configs/llm/quickstart.yaml"
NAMES = {"vit": "whole ViT", "sparseformer": "SparseFormer"}
_TIMED = 9
# Settings of a tuning that do not change what comes out.
_UNIMPORTANT = ("resume", "log_every", "keep_checkpoints", "checkpoint_every")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.quickstart", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="of the vision half")
    parser.add_argument("--teacher", type=Path, default=Path("assets/scenes_clip"), help="the whole ViT")
    parser.add_argument("--llm", type=Path, default=Path("assets/scenes_llama"), help="the language model")
    parser.add_argument("--config", type=Path, default=Path(_CONFIG), help=f"of the tuning ({_CONFIG})")
    parser.add_argument("--questions", type=int, default=400, help="held-out questions to ask")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="settings of the tuning"
    )
    options = parser.parse_args(arguments)
    started = time.time()
    try:
        folder: Path = options.folder
        encoder = folder / "bootstrap" / "encoder"
        if not (encoder / "config.json").is_file():
            raise InputError(f"There is no encoder in {encoder}; run python -m bootstrap.quickstart first.")
        records = folder / "scenes" / "train" / "chat.json"
        if not records.is_file():
            raise InputError(f"There are no scenes ({records}); run python -m bootstrap.quickstart first.")
        language = folder / "language"
        _say("two small LLaVAs: one with the whole ViT, one with the SparseFormer")
        for name in NAMES:
            _assemble(name, encoder, options.teacher, options.llm, language / name / "llava")
        shuffle_turns(records, language / "chat.json")
        _say(f"tuning both, {_steps(options.config, options.overrides)} steps each")
        _tune(language, folder / "scenes" / "train", options.config, options.overrides)
        _say(f"asking both {options.questions} questions, with the picture and without")
        outcomes = ask(language, folder / "scenes" / "heldout", options.questions)
        example = show_answers(outcomes, folder / "scenes" / "heldout" / "images")
        seconds = time_first_tokens(language, folder / "scenes" / "heldout" / "images")
        figures = summarise(outcomes, language, seconds)
        figures["minutes"] = (time.time() - started) / 60
        write_atomic(language / "quickstart.json", json.dumps(figures, indent=2) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"quickstart: {error}") from None
    print(f"{example}\n\n{format_table(figures)}\n\n{describe(figures)}")
    tuned = language / "sparseformer" / "tuned" / "final"
    print(f"\nTalk to it: {sys.executable} -m llm_integration.chat --model {tuned} --image PICTURE")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _assemble(name: str, encoder: Path, teacher: Path, llm: Path, out: Path) -> None:
    if not (out / "config.json").is_file():
        eyes, vit = (None, teacher) if name == "vit" else (encoder, None)
        assemble(eyes, str(llm), out, vit=vit)
        return
    facts = json.loads((out / ASSEMBLY_FILE).read_text(encoding="utf-8"))
    other = {
        f"another encoder than {encoder} does now": name != "vit"
        and facts.get("encoder_provenance") != load_provenance(encoder),
        f"another ViT than {teacher}": name == "vit" and facts.get("vit") != str(teacher.resolve()),
        f"another language model than {llm}": Path(facts.get("llm", "")).resolve() != llm.resolve(),
    }
    for what in (words for words, differs in other.items() if differs):
        raise InputError(
            f"{out} holds {what}, so its answers would be those of the other one: delete {out.parents[1]} "
            "and run again"
        )


def shuffle_turns(source: Path, out: Path) -> None:
    """Puts the questions of each conversation in another order, so that any of them may come first.

    The generator begins with a description; a model that never saw a question right after the picture would
    describe the picture whatever it is asked.
    """
    records = json.loads(source.read_text(encoding="utf-8"))
    for number, record in enumerate(records):
        turns = record["conversations"]
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        random.Random(number).shuffle(pairs)
        for place, (asked, _) in enumerate(pairs):
            words = asked["value"].replace("<image>\n", "")
            asked["value"] = f"<image>\n{words}" if place == 0 else words
        record["conversations"] = [turn for pair in pairs for turn in pair]
    write_atomic(out, json.dumps(records))


def _tune(language: Path, scenes: Path, config: Path, overrides: Sequence[str]) -> None:
    """Tune both, side by side where there are two cores, each in a process of its own.

    Raises:
        InputError: if one ends badly, or was tuned before with other settings.
    """
    words = {
        name: [
            f"model={language / name / 'llava'}",
            f"out={language / name / 'tuned'}",
            f"data.records=[{language / 'chat.json'}]",
            f"data.pictures={scenes / 'images'}",
            *overrides,
        ]
        for name in NAMES
    }
    for name in NAMES:
        _check_tuned(load_settings(config, words[name]))
    waiting = [name for name in NAMES if not (language / name / "tuned" / "final").is_dir()]
    at_once = 2 if (os.cpu_count() or 1) > 1 else 1
    while waiting:
        part, waiting = waiting[:at_once], waiting[at_once:]
        threads = max(1, (os.cpu_count() or 1) // len(part))
        processes = {}
        for name in part:
            with (language / name / "tune.log").open("wb") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "llm_integration.train", str(config), *words[name]],
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )
        _watch(processes, language, _steps(config, overrides))


def _check_tuned(settings: TrainSettings) -> None:
    """Sees that a model which is tuned already was tuned with these settings."""
    before = settings.out / SETTINGS_FILE
    if not (settings.out / "final").is_dir() or not before.is_file():
        return
    then = json.loads(before.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings_to_dict(settings)))
    other = [key for key in now if key not in _UNIMPORTANT and then.get(key) != now[key]]
    if other:
        raise InputError(
            f"{settings.out} was tuned with other settings ({', '.join(other)}): delete "
            f"{settings.out.parents[1]} to tune again, or name another --folder"
        )


def _steps(config: Path, overrides: Sequence[str]) -> int:
    steps = yaml.safe_load(config.read_text(encoding="utf-8")).get("max_steps", 0)
    given = [word.partition("=")[2] for word in overrides if word.startswith("max_steps=")]
    return int(given[-1] if given else steps or 0)


def _watch(processes: Mapping[str, subprocess.Popen[bytes]], language: Path, steps: int) -> None:
    """Show how far the processes are, and see that they end well."""
    with tqdm(total=steps * len(processes), unit="step", desc="tuning", disable=None) as bar:
        while True:
            running = [name for name, process in processes.items() if process.poll() is None]
            lasts = {name: _last_line(language / name / "tuned" / "log.jsonl") for name in processes}
            bar.update(sum(int(last.get("step", 0)) for last in lasts.values()) - bar.n)
            bar.set_postfix({name: f"{last['loss']:.3f}" for name, last in lasts.items() if "loss" in last})
            if not running:
                break
            time.sleep(1)
    for name, process in processes.items():
        if process.returncode:
            log = language / name / "tune.log"
            last = (log.read_text(errors="replace").strip().splitlines() or ["no word"])[-1]
            raise InputError(f"Tuning {NAMES[name]} ended with status {process.returncode}: {last} ({log})")


def _last_line(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # being written
        if "loss" in row:
            return row
    return {}


def ask(language: Path, heldout: Path, questions: int) -> dict[str, Rescored]:
    """Both models, and both without a picture, over the same questions."""
    files = BenchmarkSettings(
        "scenes", heldout / "questions.json", heldout / "annotations.json", heldout / "images"
    )
    outcomes = {}
    for name in NAMES:
        for floor in ("none", "no-image"):
            label = name if floor == "none" else f"{name}_{floor}"
            settings = RunSettings(
                model=language / name / "tuned" / "final",
                task=files,
                out=language / "runs" / label,
                floor=floor,
                batch=25,
                limit=questions,
                protocol=BARE,
            )
            outcome = run(settings, [f"(eval.quickstart, {label})"])
            if outcome is not None:
                outcomes[label] = outcome
    return outcomes


def show_answers(outcomes: Mapping[str, Rescored], images: Path) -> str:
    """What both models say about the picture that most questions were asked about, and what is true."""
    examples = outcomes["vit"].examples
    busiest, _ = Counter(str(example.image) for example in examples).most_common(1)[0]
    lines = [f"{images / busiest}"]
    for example in examples:
        if example.image == busiest:
            said = (f"{NAMES[name]}: {outcomes[name].matched.answers[example.key]}" for name in NAMES)
            lines.append(f"  {example.question}  {'; '.join(said)}; right: {example.answers[0]}")
    return "\n".join(lines)


def time_first_tokens(language: Path, images: Path) -> dict[str, float]:
    """Median seconds from a finished prompt to the first token, both models in turn."""
    picture = open_picture(sorted(images.glob("*.png"))[0])
    message = [build_message("What do you see?", [picture])]
    chats = {name: load_chat(language / name / "tuned" / "final") for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in chats}
    for turn in range(_TIMED + 2):
        for name, chat in chats.items():
            seconds = chat.reply(message, max_new_tokens=1).seconds_to_first_token
            if turn >= 2:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def summarise(
    outcomes: Mapping[str, Rescored], language: Path, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Everything the table shows, and the paired difference."""
    figures: dict[str, Any] = {"rows": {}}
    for label, outcome in outcomes.items():
        figure = outcome.figures["accuracy"]
        scores = json.loads((language / "runs" / label / "scores.json").read_text(encoding="utf-8"))
        by_kind = {
            name.partition("/")[2]: [part.value, part.n]
            for name, part in outcome.figures.items()
            if name.startswith("question_type/")
        }
        figures["rows"][label] = {
            "accuracy": [figure.value, figure.low, figure.high],
            "n": figure.n,
            "visual_tokens": scores["visual_tokens"],
            "by_kind": by_kind,
            "seconds_to_first_token": seconds.get(label),
        }
    asked = [(outcomes[name].task, outcomes[name].judgements) for name in NAMES]
    made = compare_records(*({"units": task.units(told), GROUPS: task.groups(told)} for task, told in asked))
    figures["difference"] = [made.difference, made.low, made.high]
    return figures


def format_table(figures: Mapping[str, Any]) -> str:
    """The printed table."""
    lines = [f"{'':24}{'tokens':>8}{'accuracy':>11}{'95 % interval':>17}{'n':>6}{'first token':>14}"]
    for label, row in figures["rows"].items():
        value, low, high = row["accuracy"]
        first = row["seconds_to_first_token"]
        interval, waited = f"{low:.1f} ... {high:.1f}", "" if first is None else f"{1000 * first:.0f} ms"
        lines.append(
            f"{_name_row(label):<24}{row['visual_tokens']:>8.0f}{value:>10.1f}%{interval:>17}"
            f"{row['n']:>6}{waited:>14}"
        )
    return "\n".join(lines)


def describe(figures: Mapping[str, Any]) -> str:
    """What the table is about, by kind of question."""
    kinds = sorted({kind for row in figures["rows"].values() for kind in row["by_kind"]})
    value, low, high = figures["difference"]
    lines = [f"{'by kind of question, %':<24}" + "".join(f"{kind:>12}" for kind in kinds)]
    for label, row in figures["rows"].items():
        shares = (row["by_kind"].get(kind, [float("nan"), 0])[0] for kind in kinds)
        lines.append(f"{_name_row(label):<24}" + "".join(f"{share:>12.0f}" for share in shares))
    return "\n".join(
        [
            *lines,
            "",
            "Questions about held-out scenes, VQA v2 scoring. SparseFormer minus ViT: "
            f"{value:+.1f} points, 95 % {low:+.1f} ... {high:+.1f} (paired bootstrap over pictures).",
            f"{figures['minutes']:.1f} minutes.",
        ]
    )


def _name_row(label: str) -> str:
    name, _, floor = label.partition("_")
    return NAMES[name] + (f", {floor}" if floor else "")


if __name__ == "__main__":
    main()
