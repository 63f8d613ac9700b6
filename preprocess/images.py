"""Image bytes for a beton: a plain RGB JPEG goes in as it is, anything else is converted once."""

import io
import struct
import warnings
from dataclasses import dataclass

from PIL import Image, ImageFile, ImageOps

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_END_OF_IMAGE = b"\xff\xd9"
_MAX_SIDE = 65_535
_ORIENTATION = 0x0112


class BadImage(Exception):
    """Bytes that give no image. `reason` is a counted class, the text the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


@dataclass(frozen=True)
class Jpeg:
    """What a JPEG's header says. `components` 3 is colour; `turned`: EXIF may ask for another orientation."""

    width: int
    height: int
    components: int
    bits: int
    turned: bool


def jpeg_header(data: bytes) -> Jpeg | None:
    """Read the markers up to the first frame; None if `data` is no JPEG or its header is damaged."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, turned = 2, False
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
            return Jpeg(width, height, components, bits, turned)
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            turned = True
        at += 2 + length
    return None


def prepare(data: bytes, quality: int, max_pixels: int) -> tuple[bytes, int, int]:
    """The JPEG bytes that go into the beton, with width and height in pixels.

    Plain RGB JPEGs (8 bits, 3 components, upright, complete) are returned untouched. The rest is decoded and written
    as JPEG of `quality`: transparency on white, EXIF orientation applied, 16-bit and palette images reduced.

    Raises:
        BadImage: no image, cut short, or more than `max_pixels` pixels.
    """
    header = jpeg_header(data)
    if header is not None:
        _check_size(header.width, header.height, max_pixels)
        complete = data.endswith(_END_OF_IMAGE) or data.rstrip(b"\0").endswith(_END_OF_IMAGE)
        if header.components == 3 and header.bits == 8 and complete and not (header.turned and _orientation(data) != 1):
            return data, header.width, header.height
    image = _decode(data, max_pixels)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), image.width, image.height


def image_size(head: bytes) -> tuple[int, int] | None:
    """Width and height in pixels from the first bytes of an image file of any format; None if they do not tell."""
    header = jpeg_header(head)
    if header is not None:
        return header.width, header.height
    parser = ImageFile.Parser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            parser.feed(head)
    except Exception:  # a damaged header: the image stage names the fault
        return None
    return parser.image.size if parser.image else None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("not an image", f"{width} x {height} pixels")
    if width * height > max_pixels or max(width, height) > _MAX_SIDE:
        raise BadImage("too many pixels", f"{width} x {height}; allowed: {max_pixels} pixels, {_MAX_SIDE} a side")


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable EXIF says nothing about orientation
        return 1


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    """Decode to upright RGB on white. PIL's plugins raise many types on damaged bytes; each becomes a BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        _check_size(*image.size, max_pixels)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(canvas, image)
        return image.convert("RGB")
    except BadImage:
        raise
    except Exception as error:
        reason = "image cut or damaged" if data[:3] == b"\xff\xd8\xff" else "not an image"
        raise BadImage(reason, f"{type(error).__name__}: {error}") from None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (I;16) or 32-bit grey (I, F) to 8 bits: the top byte of 16."""
    return image.convert("I").point(lambda value: value / 256.0).convert("L")
