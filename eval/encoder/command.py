"""What the commands of this room share: options, both looks over the same pictures, figures side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bootstrap.teacher import Teacher
from eval.answers import InputError, name_some
from eval.compare import Comparison, compare_groups, compare_scores
from eval.device import choose_device
from eval.encoder.features import Features, extract
from eval.encoder.looks import Look, load_encoder_look, load_teacher_look
from eval.encoder.pictures import Pictures
from eval.intervals import Figure, accuracy_figure, grouped_figure
from eval.outputs import check_output, write_output
from eval.provenance import describe_origin


def positive(text: str) -> int:
    """An option's whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, and is {value}")
    return value


def build_parser(name: str, about: str, needs_teacher: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all commands have."""
    parser = argparse.ArgumentParser(prog=f"python -m eval.{name}", description=about)
    parser.add_argument(
        "--encoder", type=Path, help="encoder directory; without it only the teacher is scored"
    )
    parser.add_argument(
        "--num-tokens", type=positive, help="tokens of a picture (default: the encoder's own)"
    )
    parser.add_argument(
        "--teacher", required=needs_teacher, help="as in bootstrap: open_clip:…, timm:…, hf:…, DIR"
    )
    parser.add_argument("--weights", help="checkpoint file of the teacher")
    parser.add_argument("--batch", type=positive, default=64, help="pictures at once (default 64)")
    parser.add_argument("--limit", type=positive, help="only so many pictures, evenly over the classes")
    parser.add_argument("--workers", type=positive, default=4, help="threads that read pictures (default 4)")
    parser.add_argument("--max-bad", type=int, default=100, help="unreadable pictures allowed (default 100)")
    parser.add_argument("--cache", type=Path, help="folder to keep embeddings in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser


def load_looks(options: argparse.Namespace) -> tuple[dict[str, Look], Teacher | None]:
    """The looks that the options name, "teacher" first, and the teacher for its text side.

    Raises:
        InputError: If neither an encoder nor a teacher is named, or one cannot be loaded.
    """
    looks: dict[str, Look] = {}
    teacher = None
    if options.teacher is not None:
        looks["teacher"], teacher = load_teacher_look(options.teacher, options.weights, options.device)
    if options.encoder is not None:
        looks["encoder"] = load_encoder_look(options.encoder, options.num_tokens, options.device)
    if not looks:
        raise InputError("Name --encoder, --teacher or both.")
    return looks, teacher


def see(looks: Mapping[str, Look], pictures: Pictures, options: argparse.Namespace) -> dict[str, Features]:
    """Embeddings of all looks; they skip the same pictures, since reading comes before looking."""
    chosen = pictures.first(options.limit)
    return {
        name: extract(look, chosen, options.batch, options.cache, options.max_bad, options.workers)
        for name, look in looks.items()
    }


def labels_of(pictures: Pictures, options: argparse.Namespace, places: Sequence[int]) -> Tensor:
    """Labels (n,) of the pictures that could be read.

    Raises:
        InputError: If none are known.
    """
    chosen = pictures.first(options.limit)
    if chosen.labels is None:
        raise InputError(no_labels(pictures))
    return torch.tensor([chosen.labels[place] for place in places])


def no_labels(pictures: Pictures) -> str:
    """The message for pictures without labels."""
    return (
        f"Nothing says what the pictures of {pictures.source} show: put them in class folders, name them "
        "like 207_golden_retriever.jpg, or pass a JSON file of labels."
    )


@dataclasses.dataclass
class Sheet:
    """Figures of one command.

    Attributes:
        protocol: What was measured, in words.
        figures: Per look, by name.
        differences: Encoder minus teacher, paired, by name.
        notes: Lines below the table.
    """

    protocol: str
    figures: dict[str, dict[str, Figure]] = dataclasses.field(default_factory=dict)
    differences: dict[str, Comparison] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(
        self,
        hits: Mapping[str, Mapping[str, Sequence[int]]],
        groups: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Adds right-or-wrong scores.

        Args:
            hits: Look, then figure, then one score a question.
            groups: For figures whose questions are not independent, the group of each: intervals and
                comparisons are then over groups.
        """
        # Where every question is a group, they are independent.
        grouped = {name: part for name, part in (groups or {}).items() if len(set(part)) < len(part)}
        for look, by_name in hits.items():
            made = self.figures.setdefault(look, {})
            for name, scores in by_name.items():
                if name in grouped:
                    made[name] = grouped_figure(scores, grouped[name], self.protocol)
                else:
                    made[name] = accuracy_figure(scores, self.protocol)
        if {"teacher", "encoder"} <= hits.keys():
            for name, scores in hits["teacher"].items():
                theirs = hits["encoder"][name]
                if name in grouped:
                    self.differences[name] = compare_groups(scores, theirs, grouped[name])
                else:
                    both = ({str(row): score for row, score in enumerate(part)} for part in (scores, theirs))
                    self.differences[name] = compare_scores(*both)

    def note_bad(self, features: Mapping[str, Features]) -> None:
        """Counts and names the pictures that could not be read."""
        bad = next(iter(features.values())).bad
        if bad:
            self.notes.append(f"{len(bad)} pictures could not be read: {name_some(bad, 3)}")

    def format(self) -> str:
        """The printed table."""
        width = max(len(name) for part in self.figures.values() for name in part)
        lines = [self.protocol, f"{'':<10}{'':<{width}}  {'value':>8}  {'95 % interval':>18}  {'n':>6}"]
        for look, part in self.figures.items():
            for name, figure in part.items():
                spread = f"{figure.low:.2f} ... {figure.high:.2f}"
                lines.append(f"{look:<10}{name:<{width}}  {figure.value:>7.2f}%  {spread:>18}  {figure.n:>6}")
        for name, made in self.differences.items():
            lines.append(
                f"encoder - teacher, {name}: {made.difference:+.2f} points, 95 % {made.low:+.2f} ... "
                f"{made.high:+.2f} (paired bootstrap)"
                + (f", McNemar p = {made.p:.3g}" if made.p is not None else " over pictures")
            )
            if made.first:
                lines.append(f"kept, {name}: {100 * made.second / made.first:.1f} %")
        return "\n".join([*lines, *self.notes])


def run_command(
    name: str, parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], Sheet], arguments: Any
) -> int:
    """Parses, works, prints, writes; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    try:
        options.device = str(choose_device(options.device, "--device "))
        others = [value for name, value in vars(options).items() if name != "json"]
        check_output(options.json, "--json", [Path(v) for v in others if isinstance(v, Path | str)])
        sheet = work(options)
        print(sheet.format())
        if options.json is not None:
            settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
            content = {
                "command": name,
                **dataclasses.asdict(sheet),
                "provenance": describe_origin(f"eval.{name}", words, settings, options.device),
            }
            write_output(options.json, json.dumps(content, indent=1, ensure_ascii=False), "--json")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
