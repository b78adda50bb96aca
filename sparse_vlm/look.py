"""See what an encoder looks at.

``python -m sparse_vlm.look --encoder DIR --image FILE -o OUT.png``
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .atomic import write_atomic
from .checkpoint import load_encoder
from .draw import draw_rois
from .encoder import SparseFormer
from .transform import UNREADABLE, ImageTransform, TransformConfig


class PictureError(ValueError):
    """A picture that cannot be opened, with where it is."""


def look(
    encoder: SparseFormer,
    picture: Image.Image,
    num_tokens: int | None = None,
    *,
    columns: int = 3,
    panel_width: int = 480,
    theme: str = "light",
    only: Sequence[int] | None = None,
) -> Image.Image:
    """Run an encoder on a picture and draw where each of its latent tokens looks at every step.

    Args:
        encoder: the encoder; its device and precision are used as they are.
        picture: any Pillow picture.
        num_tokens: tokens of the call, class token included; the encoder's own count by default.
        columns: panels in a row.
        panel_width: width of a panel in pixels.
        theme: ``"light"`` or ``"dark"``.
        only: latent tokens to draw; all by default.

    Returns:
        An RGB picture, one panel per step.

    Raises:
        ValueError: for a token count that the encoder cannot make, or a latent token that is not there.
    """
    image = encoder.transform(picture).unsqueeze(0).to(encoder.device)
    with torch.no_grad():
        focus = encoder.focus(image, num_tokens)
    return draw_rois(
        crop_large(encoder.transform.config, picture, panel_width),
        [rois[0] for rois in focus.rois],
        [points[0] for points in focus.points],
        columns=columns,
        panel_width=panel_width,
        theme=theme,
        only=only,
    )


def crop_large(config: TransformConfig, picture: Image.Image, width: int) -> Image.Image:
    """The part of a picture that an encoder sees, at least ``width`` pixels wide."""
    factor = max(1, math.ceil(width / config.width))

    def enlarge(size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if size is None or isinstance(size, int):
            return size and factor * size
        return factor * size[0], factor * size[1]

    enlarged = dataclasses.replace(
        config,
        image_size=enlarge(config.image_size),  # type: ignore[arg-type]
        resize_size=enlarge(config.resize_size),
        interpolation="bicubic",
    )
    return ImageTransform(enlarged).crop(picture)


def open_picture(path: Path) -> Image.Image:
    """Open a picture file.

    Raises:
        PictureError: if it is missing or no picture.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (FileNotFoundError, IsADirectoryError):
        raise PictureError(f"there is no picture file at {path}") from None
    except UNREADABLE as error:
        raise PictureError(f"{path} cannot be read as a picture: {error}") from error


def _read_tokens(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--only must be numbers with commas between them, like 0,7,12, got {text!r}"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_vlm.look",
        description="Draw the regions of interest and sampling points of every token over a photograph.",
    )
    parser.add_argument("--encoder", type=Path, required=True, metavar="DIR", help="an encoder directory")
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="the photograph")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png", help="where to draw")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens, class token included")
    parser.add_argument("--only", metavar="I,J,...", help="draw these latent tokens only, counted from 0")
    parser.add_argument("--columns", type=int, default=3, metavar="N", help="panels in a row (default 3)")
    parser.add_argument("--width", type=int, default=480, metavar="PX", help="width of a panel (default 480)")
    parser.add_argument("--dark", action="store_true", help="a dark page, for slides")
    options = parser.parse_args(arguments)
    try:
        only = None if options.only is None else _read_tokens(options.only)
        picture = open_picture(options.image)
        if Image.registered_extensions().get(options.output.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"--output {options.output} must end in .png, .jpg or the like")
        drawing = look(
            load_encoder(options.encoder),
            picture,
            options.tokens,
            columns=options.columns,
            panel_width=options.width,
            theme="dark" if options.dark else "light",
            only=only,
        )
        write_atomic(options.output, lambda path: drawing.save(path, dpi=(300, 300)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {drawing.width} x {drawing.height} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
