"""Generated picture files, good and bad, for the data tests."""

from __future__ import annotations

import functools
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def smooth(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A colourful picture that survives JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, format_name: str = "JPEG", **options: object) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format_name, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, width: int = 40, height: int = 30) -> bytes:
    """A small JPEG file."""
    return encode(smooth(width, height, seed), quality=90)


def animation() -> bytes:
    """A GIF whose first frame is red and whose second is blue."""
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue")]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def deep_grey() -> bytes:
    """A 16-bit PNG ramp whose values are far above 255."""
    ramp = np.linspace(0, 65535, 20 * 24).astype(np.uint16).reshape(20, 24)
    return encode(Image.fromarray(ramp), "PNG")


def huge_png(edge: int) -> bytes:
    """A valid header of an enormous PNG, a decompression bomb."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", edge, edge, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def broken_deflate() -> bytes:
    """A PNG whose pixel data is noise."""
    data = bytearray(encode(smooth(), "PNG"))
    start = data.index(b"IDAT") + 10
    data[start : start + 40] = bytes(range(40))
    return bytes(data)


@functools.cache
def good_files() -> dict[str, bytes]:
    """Unusual files that must be decoded."""
    return {
        "cmyk.jpg": encode(smooth().convert("CMYK"), "JPEG"),
        "palette.png": encode(smooth().quantize(16), "PNG"),
        "transparent_palette.png": encode(smooth().quantize(16), "PNG", transparency=bytes([0, 128])),
        "grey_alpha.png": encode(smooth().convert("LA"), "PNG"),
        "rgba.png": encode(smooth().convert("RGBA"), "PNG"),
        "bilevel.png": encode(smooth().convert("1"), "PNG"),
        "deep.png": deep_grey(),
        "deep.tiff": encode(Image.open(io.BytesIO(deep_grey())), "TIFF"),
        "one_pixel.png": encode(smooth(1, 1), "PNG"),
        "one_pixel.jpg": encode(smooth(1, 1), "JPEG"),
        "one_row.jpg": encode(smooth(300, 1), "JPEG"),
        "animated.gif": animation(),
        "animated.webp": encode(
            smooth(), "WEBP", save_all=True, append_images=[smooth(seed=1)], lossless=True
        ),
        "progressive.jpg": encode(smooth(), "JPEG", progressive=True),
        "grey.jpg": encode(smooth().convert("L"), "JPEG"),
        "wrong_extension.png": jpeg(),
        "trailing.jpg": jpeg() + b"tail" * 50,
        "bitmap.bmp": encode(smooth(), "BMP"),
        "pixmap.ppm": encode(smooth(), "PPM"),
    }


@functools.cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that must be skipped, and the reason."""
    photo = encode(smooth(200, 160), quality=95)
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"this is no picture at all", "not a picture"),
        "html.png": (b"<!DOCTYPE html><html>404</html>", "not a picture"),
        "vector.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        "truncated.jpg": (photo[: len(photo) // 2], "truncated"),
        "header_only.jpg": (photo[:11], "truncated"),
        "truncated.png": (encode(smooth(99, 99), "PNG")[:-300], "truncated"),
        "deflate.png": (broken_deflate(), ""),
        "bomb.png": (huge_png(12_000), "too large"),
        "bigger_bomb.png": (huge_png(40_000), "too large"),
    }


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Writes a tar, compressed if its name says so."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
