"""k-nearest-neighbour classification by an encoder and its teacher: no text side, no training.

python -m eval.knn --encoder DIR --teacher timm:… --train FOLDER --test FOLDER
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from eval.answers import InputError
from eval.encoder.classify import score_ranks
from eval.encoder.command import Sheet, build_parser, load_looks, positive, run_command
from eval.encoder.neighbours import vote
from eval.encoder.splits import add_split_options, load_splits


def measure(options: argparse.Namespace) -> Sheet:
    """Top-1 and top-5 of both."""
    if not 0 < options.temperature < math.inf:
        raise InputError(f"--temperature must be above 0, and is {options.temperature}.")
    looks, _ = load_looks(options)
    splits = load_splits(looks, options)
    sheet = Sheet(
        f"{options.k} nearest neighbours, DINO's weighted vote, temperature {options.temperature}, "
        f"{len(splits.train_labels)} training pictures of {splits.classes} classes"
    )
    hits = {}
    for look in looks:
        scores = vote(
            splits.train[look].values,
            splits.train_labels,
            splits.test[look].values,
            options.k,
            options.temperature,
            device=options.device,
        )
        hits[look] = {f"top{k}": part for k, part in score_ranks(scores, splits.test_labels).items()}
    sheet.add(hits)
    sheet.notes.extend([splits.note] if splits.note else [])
    sheet.note_bad(splits.train)
    sheet.note_bad(splits.test)
    return sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = build_parser("knn", __doc__.split("\n")[0], needs_teacher=False)
    add_split_options(parser)
    parser.add_argument("--k", type=positive, default=20, help="neighbours (default 20)")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes (default 0.07)")
    return run_command("knn", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
