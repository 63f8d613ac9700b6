"""Images that a build rejects or has to prepare: turned by EXIF, cut, oversized, or of another format."""

import struct
import zlib

from PIL import Image

from shard_factory import encode, pixels

RGB = Image.fromarray(pixels(1, 40, 24))


EXIF_TURNED, EXIF_UPRIGHT, EXIF_WRONG = Image.Exif(), Image.Exif(), Image.Exif()
EXIF_TURNED[0x0112], EXIF_UPRIGHT[0x0112], EXIF_WRONG[0x0112] = 6, 1, 42


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose data are too short for it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


CUT_PNG = encode(RGB, "PNG")[:900]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
