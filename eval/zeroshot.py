"""Zero-shot classification by an encoder and its teacher, in the teacher's joint space.

python -m eval.zeroshot --encoder DIR --teacher assets/scenes_clip --pictures FOLDER --classes classes.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.answers import InputError
from eval.encoder.classify import build_classifier, load_classes, rank_classes, score_ranks
from eval.encoder.command import Sheet, build_parser, labels_of, load_looks, run_command, see
from eval.encoder.pictures import load_pictures

_CIFAR_TEMPLATES = ["a photo of a {}.", "a blurry photo of a {}.", "a photo of the {}."]


def measure(options: argparse.Namespace) -> Sheet:
    """Top-1 and top-5 of both."""
    looks, teacher = load_looks(options)
    if teacher is None or not teacher.has_text:
        raise InputError(
            f"The teacher {options.teacher} has no text side with a tokenizer; for such teachers there are "
            "python -m eval.knn and python -m eval.probe."
        )
    pictures = load_pictures(options.pictures, options.labels)
    if options.classes is not None:
        names, templates = load_classes(options.classes)
    elif pictures.classes is not None:
        names, templates = [name.replace("_", " ") for name in pictures.classes], _CIFAR_TEMPLATES
    else:
        raise InputError("Name the classes: --classes imagenet, or --classes FILE.json.")
    features = see(looks, pictures, options)
    labels = labels_of(pictures, options, next(iter(features.values())).places)
    if int(labels.max()) >= len(names):
        raise InputError(f"Label {int(labels.max())} has no class: {options.classes} names {len(names)}.")
    classifier = build_classifier(names, templates, teacher.encode_text)
    sheet = Sheet(f"zero-shot, {len(names)} classes, {len(templates)} templates, {options.pictures}")
    hits = {
        look: {
            f"top{k}": scores
            for k, scores in score_ranks(rank_classes(part.values, classifier), labels).items()
        }
        for look, part in features.items()
    }
    sheet.add(hits)
    sheet.note_bad(features)
    return sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = build_parser("zeroshot", __doc__.split("\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder; or CIFAR's binary version")
    parser.add_argument("--labels", type=Path, help="JSON of file names and class indices")
    parser.add_argument(
        "--classes", help="'imagenet', or a JSON with classes and templates; default: the folders'"
    )
    return run_command("zeroshot", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
