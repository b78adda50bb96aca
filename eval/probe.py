"""Linear probe of an encoder and its teacher: logistic regression on frozen embeddings.

python -m eval.probe --encoder DIR --teacher timm:… --train FOLDER --test FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eval.encoder.classify import score_ranks
from eval.encoder.command import Sheet, build_parser, load_looks, run_command
from eval.encoder.probe import fit_probe
from eval.encoder.splits import add_split_options, load_splits


def measure(options: argparse.Namespace) -> Sheet:
    """Top-1 and top-5 of both."""
    looks, _ = load_looks(options)
    splits = load_splits(looks, options)
    sheet = Sheet(
        f"linear probe, {len(splits.train_labels)} training pictures of {splits.classes} classes, "
        "C chosen on a fifth of them"
    )
    hits = {}
    for look in looks:
        fitted = fit_probe(splits.train[look].values, splits.train_labels, splits.classes, seed=options.seed)
        scores = fitted.scores(splits.test[look].values)
        hits[look] = {f"top{k}": part for k, part in score_ranks(scores, splits.test_labels).items()}
        sheet.notes.append(f"{look}: C = {fitted.strength}")
    sheet.add(hits)
    sheet.notes.extend([splits.note] if splits.note else [])
    sheet.note_bad(splits.train)
    sheet.note_bad(splits.test)
    return sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = build_parser("probe", __doc__.split("\n")[0], needs_teacher=False)
    add_split_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the split that chooses C")
    return run_command("probe", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
