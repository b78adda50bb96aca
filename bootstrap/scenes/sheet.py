"""Draws a contact sheet of scenes with their captions.

python -m bootstrap.scenes.sheet --out docs/scenes.png
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bootstrap.scenes.draw import draw_scene
from bootstrap.scenes.scene import build_scene
from bootstrap.scenes.text import caption
from bootstrap.scenes.vocabulary import SPLITS
from sparse_vlm.atomic import write_atomic

_GAP = 10
_TEXT_HEIGHT = 72


def draw_sheet(seed: int, split: str, columns: int, rows: int, size: int) -> Image.Image:
    """A grid of the first columns x rows scenes of a split, each size pixels wide, captions below."""
    wide, high = size + _GAP, size + _TEXT_HEIGHT
    sheet = Image.new("RGB", (columns * wide + _GAP, rows * high + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for number in range(columns * rows):
        scene = build_scene(seed, number, split)
        left, top = _GAP + number % columns * wide, _GAP + number // columns * high
        sheet.paste(draw_scene(scene, size), (left, top))
        lines = textwrap.fill(caption(scene), size // 6)
        draw.multiline_text((left, top + size + 3), lines, fill=(40, 40, 45), font=font, spacing=2)
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bootstrap.scenes.sheet", description="A contact sheet.")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="side of each picture in pixels (default 128)")
    given = parser.parse_args(arguments)
    if given.columns < 1 or given.rows < 1 or given.size < 32:
        parser.error("a sheet needs at least one column, one row and pictures of 32 pixels")
    sheet = draw_sheet(given.seed, given.split, given.columns, given.rows, given.size)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    try:
        write_atomic(given.out, buffer.getvalue())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
