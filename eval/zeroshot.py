"""Zero-shot classification by an encoder and its teacher, in the teacher's joint space.

python -m eval.zeroshot --encoder DIR --teacher assets/scenes_clip --pictures FOLDER --classes classes.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.answers import InputError
from eval.encoder.classes import TEMPLATE_SETS, classes_of, label_map, load_classes
from eval.encoder.classify import build_classifier, rank_classes, score_ranks
from eval.encoder.command import Sheet, build_parser, labels_of, load_looks, no_labels, run_command, see
from eval.encoder.sources import open_pictures


def measure(options: argparse.Namespace) -> Sheet:
    """Top-1 and top-5 of both."""
    looks, teacher = load_looks(options)
    if teacher is None or not teacher.has_text:
        raise InputError(
            f"The teacher {options.teacher} has no text side with a tokenizer; for such teachers there are "
            "python -m eval.knn and python -m eval.probe."
        )
    pictures = open_pictures(options.pictures, options.labels)
    if options.classes is not None:
        classes = load_classes(options.classes, options.templates)
    else:
        classes = classes_of(pictures, options.templates)
    if pictures.labels is None:
        raise InputError(no_labels(pictures))
    places, note = label_map(pictures, classes)
    features = see(looks, pictures, options)
    own = labels_of(pictures, options, next(iter(features.values())).places)
    labels = torch.tensor(places)[own]
    classifier = build_classifier(classes.names, classes.templates, teacher.encode_text)
    sheet = Sheet(
        f"zero-shot, {len(classes.names)} classes, {len(classes.templates)} templates, {pictures.source}"
    )
    sheet.notes.extend([note] if note else [])
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
    parser.add_argument(
        "--pictures", type=Path, required=True, help="folder; or that of CIFAR's binary version"
    )
    parser.add_argument("--labels", type=Path, help="JSON of file names and class indices")
    parser.add_argument(
        "--classes", help="'imagenet', or a JSON with classes and templates; default: the folders'"
    )
    parser.add_argument(
        "--templates",
        choices=TEMPLATE_SETS,
        help="prompts to use instead of those that belong to the classes",
    )
    return run_command("zeroshot", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
