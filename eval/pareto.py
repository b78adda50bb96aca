"""Trains a small language model on every tower alike, and draws accuracy against total cost.

python -m eval.pareto configs/eval/pareto_scenes.yaml encoder=DIR out=DIR key.sub=value ...

Every training (a method at N visual tokens, with one seed) has its own file in the run's folder; a run that
was killed goes on with the next one, and several processes may share them: --share 0/2 and --share 1/2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bootstrap.memory import keep_freed_memory
from bootstrap.provenance import describe_commit
from eval.answers import InputError, read_json
from eval.baselines.combine import OURS, combine
from eval.baselines.common import Start, load_start, save_start, train_together
from eval.baselines.comparison import Comparison
from eval.baselines.config import ParetoSettings, load_settings
from eval.baselines.cost import count_parts, time_points
from eval.baselines.data import Quiz, all_texts, load_pixels, load_quizzes, plan_batches
from eval.baselines.draw import draw_pareto
from eval.baselines.points import Looker, Point, build_reader, check_alike, run_point
from eval.baselines.reader import OPENING, Reader, ask
from eval.baselines.table import write_table
from eval.provenance import describe_origin
from sparse_vlm.atomic import write_atomic
from sparse_vlm.settings import settings_to_dict
from sparse_vlm.transform import ImageTransform

CONFIG = "config.json"
# What may differ when a run is taken up again: which points there are, and nothing that a point depends on.
_FREE = ("timing_rounds", "floors", "training.seeds")
# Further points too, unless all have been trained from one start that had to know them.
_FREE_WITHOUT_START = (*_FREE, "methods", "tokens", "encoder")


def run(settings: ParetoSettings, words: Sequence[str] = (), share: tuple[int, int] = (0, 1)) -> bool:
    """Runs a comparison, or goes on with one that was cut short.

    Args:
        settings: What to compare.
        words: The command line, for the provenance.
        share: (i, n): of all trainings, this process takes every n-th, starting with the i-th.

    Returns:
        Whether all points are there, and picture and table with them.

    Raises:
        InputError: If the files do not fit, an earlier run in the same folder had other settings, or points
            differ in more than their tower.
    """
    torch.set_num_threads(settings.threads)
    comparison = Comparison(settings)
    claim(settings, comparison.teacher_hash)
    train, test = load_quizzes(settings)
    missing = [p for p in comparison.points if not _file(settings, p).is_file()]
    mine = [p for p in missing if comparison.points.index(p) % share[1] == share[0]]
    transform = ImageTransform(comparison.vit.spec.transform)
    if mine:
        _run_points(mine, comparison, (train, test), transform, share[0] == 0)
    absent = [p.name for p in comparison.points if not _file(settings, p).is_file()]
    if absent:
        print(f"{len(absent)} trainings are still to come: {', '.join(absent)}")
        return False
    results = [read_json(_file(settings, point)) for point in comparison.points]
    _check_points(settings, comparison, results)
    own = 0 if comparison.encoder is None else comparison.encoder.num_tokens
    _finish(comparison, combine(results, test, own), (train, test), transform, words)
    return True


def claim(settings: ParetoSettings, teacher_hash: str) -> None:
    """Makes the run's folder with its settings, or sees that they go with those of the run in it.

    A run may get further points: other seeds, and, without a common start, other methods and token counts.

    Raises:
        InputError: If a point that is there would come out otherwise now; names the keys. Or if the settings
            that are there are damaged.
    """
    plain = {**settings_to_dict(settings), "teacher_sha256": teacher_hash}
    ours = flatten(json.loads(json.dumps(plain, default=str)))
    path = settings.out / CONFIG
    if path.is_file():
        theirs = flatten(read_json(path))
        free = _FREE if settings.training.common_steps else _FREE_WITHOUT_START
        changed = [k for k in {**ours, **theirs} if k not in free and theirs.get(k) != ours.get(k)]
        if changed:
            what = ", ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in changed)
            raise InputError(
                f"{settings.out} holds a run with other settings or weights ({what}); name another folder."
            )
    elif settings.out.is_dir() and any(settings.out.iterdir()):
        raise InputError(f"{settings.out} is not empty and holds no run; name another folder with out=….")
    write_atomic(path, json.dumps(plain, indent=1, default=str))


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _check_points(
    settings: ParetoSettings, comparison: Comparison, results: Sequence[dict[str, Any]]
) -> None:
    """Sees that points differ in their tower only, and that ours are of this encoder."""
    check_alike(results)
    for result in results:
        if result["encoder_sha256"] not in (None, comparison.encoder_hash):
            path = _file(settings, Point(result["method"], result["tokens"], result["seed"]))
            raise InputError(
                f"{path} is of another encoder than {settings.encoder}; delete it and run again."
            )


def _file(settings: ParetoSettings, point: Point) -> Path:
    return settings.out / "points" / f"{point.name}.json"


def _run_points(
    points: Sequence[Point],
    comparison: Comparison,
    quizzes: tuple[Quiz, Quiz],
    transform: ImageTransform,
    first: bool,
) -> None:
    settings, training = comparison.settings, comparison.settings.training
    train, test = quizzes
    count = len(train.pictures) + len(test.pictures)
    with tqdm(total=count, unit="picture", desc="pictures", disable=None) as bar:
        lookers = [Looker(load_pixels(quiz, transform, bar.update)) for quiz in quizzes]
    texts = all_texts(train)
    seeds = dict.fromkeys(point.seed for point in points)
    commit = describe_commit()  # of what is about to run, whatever is committed meanwhile
    starts = {seed: _start(comparison, train, lookers[0], seed, first) for seed in seeds}
    with tqdm(total=len(points) * training.steps, unit="step", disable=None) as bar:
        for point in points:
            bar.set_description(point.name)

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            started = time.process_time()
            plan = plan_batches(train, training.steps, training.batch, training.turns, point.seed)
            tower = comparison.build(point)
            reader = build_reader(settings, texts, comparison.vit.spec.width, point.seed)
            start = starts[point.seed]
            if start is not None:
                start.fill(reader, tower, point.label)
            result = run_point(point, tower, reader, plan, (lookers[0], lookers[1]), test, settings, on_step)
            result["encoder_sha256"] = comparison.encoder_hash if point.method == OURS else None
            result["commit"] = commit
            result["cpu_seconds"] = round(time.process_time() - started, 1)
            write_atomic(_file(settings, point), json.dumps(result, indent=1, ensure_ascii=False))


def _start(comparison: Comparison, train: Quiz, looker: Looker, seed: int, first: bool) -> Start | None:
    """The common start of a seed: read, or made by the first process."""
    settings, training = comparison.settings, comparison.settings.training
    if not training.common_steps:
        return None
    path = settings.out / "common" / f"seed{seed}.safetensors"
    points = [p for p in comparison.points if p.seed == seed and p.tokens]
    labels = [point.label for point in points]
    facts = {"encoder": comparison.encoder_hash}
    if not path.is_file():
        if not first:
            raise InputError(f"{path} is not there yet; the process with --share 0/N makes it.")
        # Other pictures and questions first than in the points' own training.
        plan = plan_batches(train, training.common_steps, training.batch, training.turns, seed + 1_000_003)
        reader = build_reader(settings, all_texts(train), comparison.vit.spec.width, seed)
        towers = {point.label: tower for point in points if (tower := comparison.build(point)) is not None}
        with tqdm(total=training.common_steps, unit="step", desc="common start", disable=None) as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            save_start(path, train_together(reader, towers, looker, plan, settings, seed, on_step), facts)
    return load_start(path, labels, facts)


def _finish(
    comparison: Comparison,
    results: list[dict[str, Any]],
    quizzes: tuple[Quiz, Quiz],
    transform: ImageTransform,
    words: Sequence[str],
) -> None:
    """Costs of all points in the same minute, then the picture and the table."""
    settings, training = comparison.settings, comparison.settings.training
    train, test = quizzes
    first = Quiz(test.task, test.examples[:1], test.folder)
    image = load_pixels(first, transform)
    seed = training.seeds[0]
    reader = build_reader(settings, all_texts(train), comparison.vit.spec.width, seed).eval()
    prompt = usual_length(test, reader)
    places = [Point(result["method"], result["tokens"], seed) for result in results]
    towers = {place.label: comparison.build(place) for place in places}
    clocks = time_points(towers, reader, image, prompt, settings.timing_rounds)
    for result, place in zip(results, places, strict=True):
        result["gmacs"] = count_parts(towers[place.label], reader, image, prompt)
        result["ms"] = clocks[place.label]
    plain = json.loads(json.dumps(settings_to_dict(settings), default=str))
    (figure,) = results[0]["figures"]
    content = {
        "task": test.task.name,
        "scorer": test.task.scorer,
        "primary": figure,
        "protocol": f"bare question: {OPENING}<picture>{ask('<question>', first=True)}",
        "prompt_tokens": prompt,
        "parameters": {"language model": count_weights(reader.llm), "projector": count_projector(reader)},
        "skipped": comparison.skipped,
        "facts": {**comparison.facts, "encoder_sha256": comparison.encoder_hash},
        "points": results,
        "provenance": describe_origin("eval.pareto", words, plain, "cpu"),
    }
    title = f"{test.task.name}: {len(test.examples)} questions, {len(test.pictures)} pictures"
    write_atomic(settings.out / "pareto.json", json.dumps(content, indent=1, ensure_ascii=False))
    write_atomic(
        settings.out / "pareto.png",
        draw_pareto(results, figure, title, describe(content, settings)),
    )
    table = write_table(results, figure, comparison.skipped)
    write_atomic(settings.out / "pareto.md", table)
    print(table)
    print(f"{settings.out / 'pareto.png'}, pareto.md, pareto.json")


def describe(content: dict[str, Any], settings: ParetoSettings) -> str:
    """What was equal for all points, and what the intervals cover."""
    training, million = settings.training, content["parameters"]["language model"] / 1e6
    trained = "projector and language model" if training.train_language else "projector"
    common = f"{training.common_steps} common steps and " if training.common_steps else ""
    count = len(training.seeds)
    return (
        f"Same teacher, language model ({million:.1f} M), {common}{training.steps} steps of "
        f"{training.batch} pictures; {trained} trained. Bars: 95 % over the choice of pictures, not of "
        f"trainings ({'one training' if count == 1 else f'{count} trainings'} a point)."
    )


def usual_length(test: Quiz, reader: Reader) -> int:
    """Median number of tokens of the prompts."""
    return int(statistics.median(len(reader.encode_question(e.question)) for e in test.examples))


def count_weights(module: torch.nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_projector(reader: Reader) -> int:
    """Parameters of the projector."""
    return count_weights(reader.first) + count_weights(reader.second)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.pareto", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="YAML file, for instance configs/eval/pareto_scenes.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="settings on top of the file"
    )
    parser.add_argument("--share", default="0/1", metavar="I/N", help="take every N-th point from the I-th")
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    keep_freed_memory()
    try:
        index, _, count = options.share.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise InputError(f"--share {options.share}: expected I/N with I from 0 to N - 1, such as 0/2.")
        run(load_settings(options.config, options.overrides), words, (int(index), int(count)))
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
