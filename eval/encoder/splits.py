"""Training and test pictures with one numbering of their classes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eval.answers import InputError
from eval.encoder.command import labels_of, see
from eval.encoder.features import Features
from eval.encoder.looks import Look
from eval.encoder.pictures import load_pictures


@dataclass(frozen=True)
class Splits:
    """Embeddings and labels of both splits.

    Attributes:
        train: By look.
        train_labels: (n,).
        test: By look.
        test_labels: (m,).
        classes: How many there are.
    """

    train: dict[str, Features]
    train_labels: Tensor
    test: dict[str, Features]
    test_labels: Tensor
    classes: int


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the splits."""
    parser.add_argument("--train", type=Path, required=True, help="labelled pictures to learn from")
    parser.add_argument("--test", type=Path, required=True, help="labelled pictures to be tested on")
    parser.add_argument("--train-labels", type=Path, help="JSON of file names and class indices")
    parser.add_argument("--test-labels", type=Path, help="JSON of file names and class indices")


def load_splits(looks: Mapping[str, Look], options: argparse.Namespace) -> Splits:
    """Reads and embeds both splits.

    Raises:
        InputError: If their classes are not the same, or the folders are.
    """
    if options.train.resolve() == options.test.resolve():
        raise InputError("--train and --test are the same folder.")
    train = load_pictures(options.train, options.train_labels)
    test = load_pictures(options.test, options.test_labels)
    if train.classes is not None and test.classes is not None and train.classes != test.classes:
        strange = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(f"--train and --test have other classes ({', '.join(strange[:5])}).")
    seen, asked = see(looks, train, options), see(looks, test, options)
    train_labels = labels_of(train, options, next(iter(seen.values())).places)
    test_labels = labels_of(test, options, next(iter(asked.values())).places)
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    return Splits(seen, train_labels, asked, test_labels, classes)
