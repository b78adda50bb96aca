"""Agreement of an encoder with its teacher on pictures: cosine, the same picture found again, the same class.

python -m eval.agreement --encoder DIR --teacher assets/scenes_clip --pictures FOLDER [--classes classes.json]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from eval.answers import InputError
from eval.encoder.classes import load_classes
from eval.encoder.classify import build_classifier, rank_classes
from eval.encoder.command import Sheet, build_parser, load_looks, run_command, see
from eval.encoder.sources import open_pictures
from eval.intervals import Figure, bootstrap_mean

# Cosines of copies, which may have been embedded in batches of other sizes.
_ROUNDING = 1e-6


def measure(options: argparse.Namespace) -> Sheet:
    """All agreements; each is a share of the pictures, the cosine aside."""
    looks, teacher = load_looks(options)
    if options.encoder is None or teacher is None:
        raise InputError("Agreement needs both --encoder and --teacher.")
    features = see(looks, open_pictures(options.pictures), options)
    ours, theirs = features["encoder"].values, features["teacher"].values
    if ours.shape != theirs.shape:
        raise InputError(
            f"The encoder's embeddings have width {ours.shape[1]}, the teacher's {theirs.shape[1]}: it was "
            "made from another teacher."
        )
    sheet = Sheet(f"agreement with {options.teacher} on {len(ours)} pictures of {options.pictures}")
    near = F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).T
    hits = {"same_picture": find_own(near)}
    if options.classes is not None:
        if not teacher.has_text:
            raise InputError(f"The teacher {options.teacher} has no text side, so --classes has no use.")
        classes = load_classes(options.classes)
        classifier = build_classifier(classes.names, classes.templates, teacher.encode_text)
        same = rank_classes(ours, classifier).argmax(-1) == rank_classes(theirs, classifier).argmax(-1)
        hits["same_class"] = same.int().tolist()
    elif not teacher.has_text and teacher.spec.names_classes:
        hits["same_class"] = (ours.argmax(-1) == theirs.argmax(-1)).int().tolist()
    sheet.add({"encoder": hits})
    cosines = near.diagonal().double()
    low, high = bootstrap_mean([round(float(value), 6) for value in cosines])
    value = 100 * float(cosines.mean())
    sheet.figures["encoder"]["cosine"] = Figure(value, len(ours), 100 * low, 100 * high, "bootstrap")
    sheet.note_bad(features)
    return sheet


def find_own(near: Tensor) -> list[int]:
    """Whether nothing is nearer than the teacher's embedding of the same picture, or of a copy of it.

    Args:
        near: (n, n) cosines of the encoder's embeddings with the teacher's.
    """
    return (near.diagonal() >= near.amax(dim=1) - _ROUNDING).int().tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = build_parser("agreement", __doc__.split("\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures; or that of CIFAR")
    parser.add_argument("--classes", help="'imagenet', or a JSON with classes and templates")
    return run_command("agreement", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
