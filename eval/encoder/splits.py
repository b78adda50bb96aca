"""Training and test pictures with one numbering of their classes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eval.answers import InputError, name_some
from eval.encoder.command import labels_of, see
from eval.encoder.features import Features
from eval.encoder.looks import Look
from eval.encoder.pictures import Pictures
from eval.encoder.sources import open_pictures


@dataclass(frozen=True)
class Splits:
    """Embeddings and labels of both splits.

    Attributes:
        train: By look.
        train_labels: (n,).
        test: By look.
        test_labels: (m,).
        classes: How many there are.
        note: What had to be taken for granted about the labels.
    """

    train: dict[str, Features]
    train_labels: Tensor
    test: dict[str, Features]
    test_labels: Tensor
    classes: int
    note: str = ""


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """The options that name the splits."""
    parser.add_argument(
        "--train", type=Path, required=True, help="labelled pictures to learn from; or the folder of CIFAR"
    )
    parser.add_argument(
        "--test",
        type=Path,
        required=True,
        help="labelled pictures to be tested on; or the same folder of CIFAR",
    )
    parser.add_argument("--train-labels", type=Path, help="JSON of file names and class indices")
    parser.add_argument("--test-labels", type=Path, help="JSON of file names and class indices")


def load_splits(looks: Mapping[str, Look], options: argparse.Namespace) -> Splits:
    """Reads and embeds both splits.

    Raises:
        InputError: If their classes are not the same, or the folders are.
    """
    train = open_pictures(options.train, options.train_labels, "train")
    test = open_pictures(options.test, options.test_labels, "test")
    if options.train.resolve() == options.test.resolve() and train.source == test.source:
        raise InputError("--train and --test are the same folder.")
    note = _check_classes(train, test)
    seen, asked = see(looks, train, options), see(looks, test, options)
    train_labels = labels_of(train, options, next(iter(seen.values())).places)
    test_labels = labels_of(test, options, next(iter(asked.values())).places)
    known = set(train_labels.tolist())
    strange = [label for label in set(test_labels.tolist()) if label not in known]
    if len(strange) == len(set(test_labels.tolist())):
        raise InputError(
            f"No class of --test {options.test} has a picture in --train {options.train}: none is learned."
        )
    if strange:
        lost = (
            f"{len(strange)} classes of {options.test} have no picture in {options.train} and are never right"
        )
        note = f"{note}; {lost}" if note else lost
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    return Splits(seen, train_labels, asked, test_labels, classes, note)


def _check_classes(train: Pictures, test: Pictures) -> str:
    """Refuses splits that number classes differently; a note where only one of them names its classes."""
    if train.classes == test.classes:
        return ""
    named, other = (train, test) if train.classes is not None else (test, train)
    if named.classes is not None and other.classes is not None:
        strange = sorted(set(named.classes) ^ set(other.classes))
        raise InputError(
            f"--train and --test have other classes ({name_some(strange)})."
            if strange
            else "--train and --test list their classes in another order."
        )
    top, count = max(other.labels or (0,)), len(named.classes or ())
    if top >= count:
        raise InputError(f"{other.source} has the label {top}, and {named.source} {count} classes.")
    return f"labels of {other.source} are taken to be places among the classes of {named.source}"
