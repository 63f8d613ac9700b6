"""Image bytes for a beton: a plain RGB JPEG goes in as it is, anything else is converted once."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_USUAL_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive Huffman: what every decoder reads
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_START = b"\xff\xd8\xff"
_END_OF_IMAGE = b"\xff\xd9"
_MAX_SIDE = 65_500  # libjpeg's own limit
_ORIENTATION = 0x0112
_TURNED = range(2, 9)
# Not all that PIL knows: some of its formats start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BadImage(Exception):
    """Bytes that give no image. `reason` is a counted class, the text the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


@dataclass(frozen=True)
class Jpeg:
    """What a JPEG's header says. `plain`: 8-bit colour of a usual coding; `exif`: it may ask for another orientation;
    `frame_at`: offset in bytes of the frame header, after which every end mark is the image's own."""

    width: int
    height: int
    plain: bool
    exif: bool
    frame_at: int


def jpeg_header(data: bytes) -> Jpeg | None:
    """Read the markers up to the first frame; None if `data` is no JPEG or its header is damaged."""
    if not data.startswith(_JPEG_START):
        return None
    at, exif = 2, False
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _START_OF_FRAME:
            if at + 10 > len(data):
                return None
            bits, height, width, components = struct.unpack(">BHHB", data[at + 4 : at + 10])
            return Jpeg(width, height, (bits, components) == (8, 3) and marker in _USUAL_FRAMES, exif, at)
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            exif = True
        at += 2 + length
    return None


def prepare(data: bytes, quality: int, max_pixels: int) -> tuple[bytes, int, int]:
    """The JPEG bytes that go into the beton, with width and height in pixels.

    Plain RGB JPEGs (8 bits, 3 components, upright, with their end mark) are returned untouched. The rest is decoded and
    written as JPEG of `quality`: transparency on white, EXIF orientation applied, 16-bit and palette images reduced.

    Raises:
        BadImage: no image, cut short, or more than `max_pixels` pixels.
    """
    header = jpeg_header(data)
    if header is not None:
        _check_size(header.width, header.height, max_pixels)
        complete = data.find(_END_OF_IMAGE, header.frame_at) >= 0
        if header.plain and complete and not (header.exif and _orientation(data) in _TURNED):
            return data, header.width, header.height
    image = _decode(data, max_pixels)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), image.width, image.height


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels from an image file of any allowed format, or its beginning; None if that does not tell."""
    header = jpeg_header(data)
    if header is not None:
        return header.width, header.height
    try:
        with _open(data) as image:
            return image.size
    except Exception:  # a damaged header, or one that ends later: the image stage names the fault
        return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("not an image", f"{width} x {height} pixels")
    if width * height > max_pixels or max(width, height) > _MAX_SIDE:
        raise BadImage("too many pixels", f"{width} x {height}; allowed: {max_pixels} pixels, {_MAX_SIDE} a side")


def _orientation(data: bytes) -> int:
    try:
        with _open(data) as image:
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable EXIF says nothing about orientation
        return 1


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """An image of the allowed formats, for the block; PIL's own limit of pixels is off, `max_pixels` is the one that counts."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode to upright RGB on white. PIL's plugins raise many types on damaged bytes; each becomes a BadImage."""
    reason = "image cut or damaged" if data.startswith(_JPEG_START) else "not an image"
    try:
        with _open(data) as image:
            reason = "image cut or damaged"
            _check_size(*image.size, max_pixels)
            image.load()
            return _plain(image)
    except BadImage:
        raise
    except UnidentifiedImageError:  # its own text holds an address in memory, another one every time
        raise BadImage(reason, f"none of {', '.join(_FORMATS)} by its first bytes") from None
    except Exception as error:
        raise BadImage(reason, f"{type(error).__name__}: {error}") from None


def _plain(image: Image.Image) -> Image.Image:
    """Upright, 8 bits, RGB, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (I;16) or 32-bit grey (I, F) to 8 bits: the top byte of 16."""
    return image.convert("I").point(lambda value: value / 256.0).convert("L")
