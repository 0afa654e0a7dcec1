"""Pixels as a picture in the page."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from typing import Any

from attar.runtime import DataError

COLOURS = {1: 0, 3: 2}  # channels: the format's code for grey and for RGB
MOST_SIDE = 256


def data_uri(image: dict[str, Any]) -> str:
    """A ``data:`` address that holds the image as PNG.

    Args:
        image: ``height``, ``width``, ``channels`` (1 or 3) and ``pixels``: bytes in base64, row
            by row, channels last.

    Raises:
        DataError: the pixels are not as many as the sizes say.
    """
    height, width, channels = (image[name] for name in ("height", "width", "channels"))
    try:
        pixels = base64.b64decode(image["pixels"], validate=True)
    except (binascii.Error, ValueError):
        pixels = b""
    if not _fits(height, width, channels) or len(pixels) != height * width * channels:
        raise DataError(
            f"figures.json: an image of {height} x {width} x {channels} has {len(pixels)} bytes; "
            "run the recipe again, or remove the file to have a page without it"
        )
    return "data:image/png;base64," + base64.b64encode(png(pixels, width, channels)).decode()


def _fits(height: Any, width: Any, channels: Any) -> bool:
    sides = all(type(side) is int and 0 < side <= MOST_SIDE for side in (height, width))
    return sides and type(channels) is int and channels in COLOURS


def png(pixels: bytes, width: int, channels: int) -> bytes:
    """Bytes of grey (1 channel) or RGB (3) pixels as a PNG file (W3C, "PNG", third edition)."""
    row = width * channels
    height = len(pixels) // row
    header = struct.pack(">IIBBBBB", width, height, 8, COLOURS[channels], 0, 0, 0)
    # A 0 before each row: it is stored as it is, unfiltered.
    rows = b"".join(b"\0" + pixels[at : at + row] for at in range(0, len(pixels), row))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
