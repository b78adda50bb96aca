"""Image-text retrieval by an encoder and its teacher: recall at 1, 5 and 10 both ways.

python -m eval.retrieval --encoder DIR --teacher open_clip:… --annotations FILE --images FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.answers import InputError
from eval.encoder.command import Sheet, build_parser, load_looks, run_command, see
from eval.encoder.pictures import load_captioned
from eval.encoder.recall import recall

_TEXTS_AT_ONCE = 256


def measure(options: argparse.Namespace) -> Sheet:
    """Recall of both."""
    looks, teacher = load_looks(options)
    if teacher is None or not teacher.has_text:
        raise InputError(f"The teacher {options.teacher} has no text side with a tokenizer.")
    captioned = load_captioned(options.annotations, options.images, options.split, options.limit)
    features = see(looks, captioned.pictures, options)
    places = next(iter(features.values())).places
    rank = {place: row for row, place in enumerate(places)}
    kept = [(rank[o], c) for o, c in zip(captioned.owners, captioned.captions, strict=True) if o in rank]
    texts = torch.cat(
        [
            teacher.encode_text([caption for _, caption in kept[start : start + _TEXTS_AT_ONCE]])
            .float()
            .cpu()
            for start in range(0, len(kept), _TEXTS_AT_ONCE)
        ]
    )
    sheet = Sheet(f"retrieval, {len(places)} pictures, {len(kept)} captions, {options.annotations}")
    sheet.add({look: recall(part.values, texts, [o for o, _ in kept]) for look, part in features.items()})
    sheet.note_bad(features)
    return sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = build_parser("retrieval", __doc__.split("\n")[0])
    parser.add_argument("--annotations", type=Path, required=True, help="Karpathy's file, or COCO's captions")
    parser.add_argument("--images", type=Path, required=True, help="picture folder")
    parser.add_argument("--split", default="test", help="of Karpathy's file (default test)")
    return run_command("retrieval", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
