"""Bytes to pixels, quickly, and never fatally: what cannot be decoded is a `BadPictureError` with a reason.

JPEG can be decoded at 1/2, 1/4 or 1/8 of its size at a fraction of the cost ("draft"), which is what makes
large photographs cheap and gigantic ones possible. No Pillow global is touched.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from sparse_vlm.transform import to_rgb

# Raster formats only: Pillow would hand an EPS or WMF file to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
)


class BadPictureError(Exception):
    """A picture that cannot be used.

    Attributes:
        reason: one of "empty file", "not a picture", "truncated", "broken", "too large", "unreadable".
        detail: what the decoder said.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Region(NamedTuple):
    """A crop in pixels of the full-size picture, and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool = False


def decode_picture(data: bytes, max_pixels: int) -> Image.Image:
    """Decodes a whole picture; only a JPEG beyond `max_pixels` comes out smaller than it is.

    Returns:
        RGB picture (the first frame of an animation).

    Raises:
        BadPictureError: whatever is wrong with it.
    """
    return _guarded(lambda: to_rgb(_loaded(_opened(data), 1, max_pixels)))


def decode_region(
    data: bytes,
    choose: Callable[[int, int], Region],
    size: tuple[int, int],
    resampling: Image.Resampling,
    max_pixels: int,
) -> Image.Image:
    """Decodes one region of a picture, resized.

    Args:
        data: the encoded picture.
        choose: given the full width and height, names the region.
        size: (height, width) of the result.
        resampling: how to resize.
        max_pixels: most pixels to decode at once.

    Returns:
        RGB picture of `size`.

    Raises:
        BadPictureError: whatever is wrong with it.
    """

    def work() -> Image.Image:
        picture = _opened(data)
        full_width, full_height = picture.size
        region = choose(full_width, full_height)
        height, width = size
        reduction = 1
        while reduction < 8 and (
            region.right - region.left >= 2 * reduction * width
            and region.bottom - region.top >= 2 * reduction * height
        ):
            reduction *= 2
        picture = _loaded(picture, reduction, max_pixels)
        if picture.mode not in ("RGB", "L"):
            picture = to_rgb(picture)  # other modes do not survive resizing (palettes) or would cost more
        scale_x, scale_y = picture.width / full_width, picture.height / full_height
        box = (
            region.left * scale_x,
            region.top * scale_y,
            min(region.right * scale_x, picture.width),
            min(region.bottom * scale_y, picture.height),
        )
        # The gap only matters where no draft was to be had: it reduces by whole factors first.
        picture = picture.resize((width, height), resampling, box=box, reducing_gap=3.0)
        if region.mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_rgb(picture)

    return _guarded(work)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BadPictureError("empty file")
    # Not by Image.open: it has a size limit of its own, and ours is checked after a JPEG's draft.
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    Image.init()
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        answer = accepts is None or accepts(data[:16])
        if factory is None or not answer or isinstance(answer, str):  # a text: the format was not built in
            continue
        try:
            return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # as Image.open does: another format may know it
    raise UnidentifiedImageError("none of the formats that are read")


def _loaded(picture: Image.Image, reduction: int, max_pixels: int) -> Image.Image:
    """Decodes at 1/`reduction` of the size, or less to stay within `max_pixels`, where the format can."""
    width, height = picture.size
    if isinstance(picture, JpegImagePlugin.JpegImageFile) and not picture.info.get("progressive"):
        while reduction < 8 and (width // reduction) * (height // reduction) > max_pixels:
            reduction *= 2
        if reduction > 1:
            picture.draft(None, (max(width // reduction, 1), max(height // reduction, 1)))
    elif (
        isinstance(picture, JpegImagePlugin.JpegImageFile) and width * height <= max_pixels and reduction > 1
    ):
        # A progressive file keeps all coefficients in memory, so its full size is what the limit is about.
        picture.draft(None, (max(width // reduction, 1), max(height // reduction, 1)))
    if picture.width * picture.height > max_pixels:
        raise BadPictureError("too large", f"{width} x {height} pixels, the limit is {max_pixels}")
    picture.load()
    return picture


def _guarded(work: Callable[[], Image.Image]) -> Image.Image:
    try:
        return work()
    except BadPictureError:
        raise
    except UnidentifiedImageError as error:
        raise BadPictureError("not a picture", _first_line(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadPictureError("too large", _first_line(error)) from error
    except Exception as error:  # decoders raise about everything
        message = _first_line(error)
        words = ("truncated", "premature")
        cut = isinstance(error, (EOFError, struct.error)) or any(word in message.lower() for word in words)
        raise BadPictureError("truncated" if cut else "broken", message) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
