"""Writes generated scenes.

python -m bootstrap.scenes --out DIR --train 5000 --heldout 500 --seed 0
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from bootstrap.scenes.vocabulary import CLASS_NAMES, HELDOUT_PAIRS, SPLITS
from bootstrap.scenes.write import write_split
from sparse_vlm.atomic import atomic_directory

SUMMARY = "scenes.json"
# What a directory of scenes holds; one that holds anything else is never replaced.
OWNED = (*SPLITS, SUMMARY)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the generator."""
    parser = argparse.ArgumentParser(
        prog="python -m bootstrap.scenes",
        description="Writes generated scenes: pictures, captions, conversations, VQA questions, labels.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory to write, with a folder for each split"
    )
    parser.add_argument("--train", type=int, default=0, help="training scenes")
    parser.add_argument("--valid", type=int, default=0, help="new scenes of the pairs seen in training")
    parser.add_argument("--heldout", type=int, default=0, help="scenes whose main object is an unseen pair")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels (default 96)")
    parser.add_argument(
        "--questions", type=int, help="questions a scene at most (default: one of every kind)"
    )
    parser.add_argument("--shard-size", type=int, default=0, help="also write webdataset tars of so many")
    parser.add_argument("--replace", action="store_true", help="replace the scenes in OUT")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the generator; returns the exit status."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    counts = {split: getattr(given, split) for split in SPLITS}
    if min(counts.values()) < 0 or not any(counts.values()):
        parser.error("ask for at least one scene: --train, --valid or --heldout with a number above 0")
    if given.size < 32:
        parser.error(f"--size {given.size}: scenes need at least 32 pixels a side")
    if given.shard_size < 0 or (given.questions is not None and given.questions < 0):
        parser.error("--shard-size and --questions cannot be negative")
    if given.out.exists() and not given.replace:
        print(
            f"error: {given.out} exists; choose another --out or add --replace",
            file=sys.stderr,
        )
        return 1
    if given.out.is_dir() and any(given.out.iterdir()) and not (given.out / SUMMARY).is_file():
        print(
            f"error: {given.out} holds other things than scenes (it has no {SUMMARY}); choose another --out",
            file=sys.stderr,
        )
        return 1
    summary: dict[str, object] = {"seed": given.seed, "size": given.size}
    try:
        with (
            atomic_directory(given.out, owned=OWNED) as folder,
            tqdm(total=sum(counts.values()), unit="picture", disable=None) as bar,
        ):
            for split, count in counts.items():
                if count:
                    counted = write_split(
                        folder / split,
                        split,
                        count,
                        seed=given.seed,
                        size=given.size,
                        questions_per_scene=given.questions,
                        shard_size=given.shard_size,
                        on_picture=bar.update,
                    )
                    summary[split] = counted
            summary["heldout_classes"] = sorted(f"{color} {shape}" for shape, color in HELDOUT_PAIRS)
            summary["classes"] = CLASS_NAMES
            (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({split: summary[split] for split in SPLITS if split in summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
