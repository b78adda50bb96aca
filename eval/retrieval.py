"""Image-text retrieval by an encoder and its teacher: recall at 1, 5 and 10 both ways.

python -m eval.retrieval --encoder DIR --teacher open_clip:… --annotations FILE --images FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from eval.answers import InputError
from eval.encoder.captions import load_captioned
from eval.encoder.command import Sheet, build_parser, load_looks, positive, run_command, see
from eval.encoder.recall import recall

_TEXTS_AT_ONCE = 256


def measure(options: argparse.Namespace) -> Sheet:
    """Recall of both."""
    looks, teacher = load_looks(options)
    if teacher is None or not teacher.has_text:
        raise InputError(f"The teacher {options.teacher} has no text side with a tokenizer.")
    if "{}" not in options.template:
        raise InputError(f"--template has no {{}} for the caption: {options.template!r}.")
    captioned = load_captioned(
        options.annotations, options.images, options.split, options.limit, options.captions_per_picture
    )
    features = see(looks, captioned.pictures, options)
    places = next(iter(features.values())).places
    rank = {place: row for row, place in enumerate(places)}
    kept = [(rank[o], c) for o, c in zip(captioned.owners, captioned.captions, strict=True) if o in rank]
    owners = [owner for owner, _ in kept]
    texts = [options.template.replace("{}", caption) for _, caption in kept]
    embedded = torch.cat(
        [
            teacher.encode_text(texts[start : start + _TEXTS_AT_ONCE]).float().cpu()
            for start in tqdm(range(0, len(texts), _TEXTS_AT_ONCE), unit="batch", desc="texts", disable=None)
        ]
    )
    named = f", template {options.template!r}" if options.template != "{}" else ""
    sheet = Sheet(f"retrieval, {len(places)} pictures, {len(kept)} captions, {options.annotations}{named}")
    hits = {look: recall(part.values, embedded, owners) for look, part in features.items()}
    first = next(iter(hits.values()))
    # A picture's captions are not independent of each other.
    groups = {name: owners for name in first if name.startswith("text_to_image")}
    sheet.add(hits, groups)
    sheet.note_bad(features)
    return sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = build_parser("retrieval", __doc__.split("\n")[0])
    parser.add_argument("--annotations", type=Path, required=True, help="Karpathy's file, or COCO's captions")
    parser.add_argument("--images", type=Path, required=True, help="picture folder")
    parser.add_argument(
        "--captions-per-picture", type=positive, help="only the first so many of each picture"
    )
    parser.add_argument("--template", default="{}", help="text around a caption, such as 'a photo of {}'")
    parser.add_argument("--split", default="test", help="of Karpathy's file (default test)")
    return run_command("retrieval", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
