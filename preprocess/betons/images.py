"""Image bytes for a beton: a plain RGB JPEG is taken byte for byte, anything else is converted once.

    scan_jpegs (compiled, headers only, all images of a shard) -> plain: taken as it is
                                                               -> other: `prepare`: decoded by PIL, written as JPEG
                                                                  `check_in_place` (--no-images): rejected

An image whose metadata are damaged (labels/image_metadata.py) is kept and counted.

`decode_check: header` is the default: it costs almost nothing. A full decode costs several times the rest of the
writer, and the loader checks every decode anyway: it reports a bad image and excludes it from the loss. `full`
(DecodeCheck) finds bad images before training.
"""

import ctypes
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from labels import beton
from labels.image_metadata import decode_leniently, read_orientation
from labels.native import RGB, TURBOJPEG, Decompressor, njit
from labels.settings import Build, ShorterSide
from labels.storage import UserError

MAX_SIDE = 65_500  # libjpeg's own limit
MAX_BYTES = beton.MAX_PAGE_BYTES >> 1  # of an image file: its label row has to be on the same page
_MIN_BYTES = 4
_JPEG_START = b"\xff\xd8\xff"
_END_OF_IMAGE = b"\xff\xd9"
_TURNS = {  # orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = range(5, 9)
_MAX_COMMENT = 65_533  # bytes, of a JPEG: Pillow writes the comment of the file that it read
# Not all that PIL knows: some of its formats start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# A JPEG that is shrunk is decoded at a fraction of its size, but not below this many times the wanted size.
_DRAFT = 2
_CHECK_SHRINK = 8
# Warnings of libjpeg that leave every pixel as it was meant (jerror.h: EXTRANEOUS_DATA, JFIF_MAJOR, ADOBE_XFORM,
# BOGUS_PROGRESSION).
_HARMLESS = ("extraneous bytes before marker", "JFIF revision", "Adobe color transform", "Inconsistent progression")


class BadImage(Exception):
    """Bytes that give no image. `reason` is a counted class, the text the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


class PreparedImage(NamedTuple):
    """An image for a beton."""

    jpeg: bytes
    width: int  # pixels
    height: int
    damaged_metadata: bool  # of the image file


T = TypeVar("T")


def prepare(data: bytes, settings: Build) -> PreparedImage:
    """The JPEG bytes that go into the beton.

    Plain RGB JPEGs (8 bits, 3 components, upright, with their end mark) that need no shrinking are returned unchanged.
    The rest is decoded and written as JPEG: transparency on white, EXIF orientation applied, 16-bit and palette images
    reduced. BadImage: no image, cut short, or more than `max_pixels` pixels.
    """
    plain = _take_plain(data, settings)
    if plain is not None:
        return plain
    with _as_bad_image(data):
        image, damaged = _open(data, lambda image, orientation: _decode(image, orientation, settings))
        comment = image.info.get("comment", b"")
        if len(comment.encode() if isinstance(comment, str) else comment) > _MAX_COMMENT:
            del image.info["comment"]
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=settings.jpeg_quality, subsampling=settings.jpeg_subsampling)
    return PreparedImage(buffer.getvalue(), image.width, image.height, damaged)


def check_in_place(data: bytes, settings: Build) -> PreparedImage:
    """An image that stays in its tar (`--no-images`); BadImage if it would have to be converted."""
    plain = _take_plain(data, settings)
    if plain is not None:
        return plain
    header = jpeg_header(data)
    cut = header is not None and header.plain and data.find(_END_OF_IMAGE, header.frame_offset) < 0

    def describe(image: Image.Image, orientation: int) -> str:
        if cut:
            image.load()  # raises if more than the end mark is missing
        kind = f"{image.format} {image.mode}, {image.width} x {image.height}, orientation {orientation}"
        return kind + ", without its end mark" * cut

    with _as_bad_image(data):
        kind, _ = _open(data, describe)
    detail = f"{kind}; with --no-images only upright 8-bit RGB JPEGs can be read in place"
    raise BadImage("not a plain JPEG", detail)


def _take_plain(data: bytes, settings: Build) -> PreparedImage | None:
    """The image itself, if a beton takes this JPEG byte for byte."""
    header = jpeg_header(data)
    if header is None:
        return None
    _check_size(header.width, header.height, settings.max_pixels)
    shrunk = _wanted_size(header.width, header.height, settings) != (header.width, header.height)
    complete = settings.decode_check == "none" or data.find(_END_OF_IMAGE, header.frame_offset) >= 0
    if not header.plain or not complete or shrunk:
        return None
    orientation, damaged = read_orientation(data) if header.exif else (1, False)
    return None if orientation in _TURNS else PreparedImage(data, header.width, header.height, damaged)


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels by the header of an image file, or of its beginning; None if that is not enough."""
    header = jpeg_header(data)
    if header is not None:
        return header.width, header.height
    try:
        return _open(data, lambda image, _: image.size)[0]
    except Exception:  # a damaged header, or one that ends later: the image stage names the fault
        return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("not an image", f"{width} x {height} pixels")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadImage("too many pixels", f"{width} x {height}; allowed: {max_pixels} pixels, {MAX_SIDE} a side")


def _open(data: bytes, decode: Callable[[Image.Image, int], T]) -> tuple[T, bool]:
    """As decode_leniently, of the allowed formats; PIL's own limit of pixels is off: `max_pixels` counts."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return decode_leniently(data, decode, _FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _as_bad_image(data: bytes) -> Iterator[None]:
    """PIL's plugins raise many types on damaged bytes; each becomes a BadImage."""
    known = data.startswith(_JPEG_START)
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:  # its text holds an address in memory, which changes every time
        reason = "image cut or damaged" if known else "not an image"
        raise BadImage(reason, f"none of {', '.join(_FORMATS)} by its first bytes") from None
    except Exception as error:
        raise BadImage("image cut or damaged", f"{type(error).__name__}: {error}") from None


def _decode(image: Image.Image, orientation: int, settings: Build) -> Image.Image:
    """Decode to upright RGB on white, shrunk where the settings require it."""
    _check_size(*image.size, settings.max_pixels)
    wanted = _wanted_size(*image.size, settings)
    shrunk = wanted != image.size
    if shrunk:
        image.draft(None, (_DRAFT * wanted[0], _DRAFT * wanted[1]))
    image.load()
    plain = _plain(image.transpose(_TURNS[orientation]) if orientation in _TURNS else image)
    width, height = wanted[::-1] if orientation in _SIDEWAYS else wanted
    return plain.resize((width, height), Image.Resampling.BICUBIC) if shrunk else plain


def _wanted_size(width: int, height: int, settings: Build) -> tuple[int, int]:
    """Width and height of an image in the beton: the same aspect ratio, never enlarged."""
    if not isinstance(settings.images, ShorterSide) or min(width, height) <= settings.images.shorter_side:
        return width, height
    share = settings.images.shorter_side / min(width, height)
    return round(width * share), round(height * share)


def _plain(image: Image.Image) -> Image.Image:
    """8 bits, RGB, transparency on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (I;16) or 32-bit grey (I, F) to 8 bits: the top byte of 16."""
    return image.convert("I").point(lambda value: value / 256.0).convert("L")


# -- headers


@dataclass(frozen=True)
class Jpeg:
    """A JPEG's header."""

    width: int
    height: int
    plain: bool  # 8-bit colour of a usual coding
    exif: bool  # it may ask for another orientation
    frame_offset: int  # bytes before the frame header, after which every end mark is the image's own


@dataclass(frozen=True)
class Scan:
    """The headers of N images."""

    plain: np.ndarray  # bool [N], taken as they are
    width: np.ndarray  # int64 [N], pixels, where `plain`
    height: np.ndarray


def jpeg_header(data: bytes) -> Jpeg | None:
    """Read the markers up to the first frame; None if `data` is no JPEG or its header is damaged."""
    if len(data) < _MIN_BYTES:
        return None
    frame_offset, width, height, plain, exif = _header(np.frombuffer(data, np.uint8), 0, len(data))
    return None if frame_offset < 0 else Jpeg(width, height, plain, exif, frame_offset)


def scan_jpegs(data: np.ndarray, spans: np.ndarray, settings: Build) -> Scan:
    """Which images a beton takes byte for byte, by their headers alone.

    `data`: uint8 [bytes], a mapped file; `spans`: int64 [N, 2], begin and end of each image in it, begin -1: none.
    """
    shorter = settings.images.shorter_side if isinstance(settings.images, ShorterSide) else MAX_SIDE
    plain, size = np.zeros(len(spans), np.bool_), np.zeros((2, len(spans)), np.int64)
    _scan(data, spans, settings.max_pixels, shorter, settings.decode_check != "none", plain, size)
    return Scan(plain, size[0], size[1])


@njit(nogil=True, cache=True)
def _scan(
    data: np.ndarray,
    spans: np.ndarray,
    max_pixels: int,
    shorter: int,
    needs_end: bool,
    plain: np.ndarray,
    size: np.ndarray,
) -> None:
    """Fill plain bool [N] and size int64 [2, N]."""
    for row in range(len(spans)):
        begin, end = spans[row, 0], spans[row, 1]
        if begin < 0 or end - begin > MAX_BYTES:
            continue
        frame_offset, width, height, usual, exif = _header(data, begin, end)
        if frame_offset < 0 or not usual or exif or width < 1 or height < 1:
            continue
        if width * height > max_pixels or max(width, height) > MAX_SIDE or min(width, height) > shorter:
            continue
        if needs_end and not _has_end(data, begin + frame_offset, end):
            continue
        plain[row], size[0, row], size[1, row] = True, width, height


@njit(nogil=True, cache=True)
def _number(data: np.ndarray, position: Any) -> Any:
    return np.int64(data[position]) << 8 | np.int64(data[position + 1])


@njit(nogil=True, cache=True)
def _header(data: np.ndarray, begin: int, end: int) -> Any:
    """Offset of the frame header from `begin` (-1: none), width, height, is it plain, does EXIF precede it."""
    exif = False
    if end - begin < 3 or data[begin] != 0xFF or data[begin + 1] != 0xD8 or data[begin + 2] != 0xFF:
        return np.int64(-1), np.int64(0), np.int64(0), False, exif
    position = np.int64(begin + 2)
    while position + 4 <= end:
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            position += 2
            continue
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            if position + 10 > end:
                break
            # 8 bits, 3 components, and a coding that every decoder reads: baseline, extended or progressive Huffman
            plain = data[position + 4] == 8 and data[position + 9] == 3 and marker <= 0xC2
            return position - begin, _number(data, position + 7), _number(data, position + 5), plain, exif
        if marker == 0xE1 and position + 8 <= end and data[position + 4] == 0x45 and data[position + 5] == 0x78:
            exif = exif or (data[position + 6] == 0x69 and data[position + 7] == 0x66)
        position += 2 + _number(data, position + 2)
    return np.int64(-1), np.int64(0), np.int64(0), False, exif


@njit(nogil=True, cache=True)
def _has_end(data: np.ndarray, begin: int, end: int) -> bool:
    """Whether there is an end mark; searched from the end, where it usually is."""
    for position in range(end - 2, begin - 1, -1):  # noqa: SIM110 - numba compiles no generator
        if data[position] == 0xFF and data[position + 1] == 0xD9:
            return True
    return False


# -- decode_check: full


class DecodeCheck:
    """`build.decode_check: full`: every plain JPEG is decoded once, at an eighth of its size; a warning is a fault.

    PIL reports no damage in the middle of a JPEG, so the decoder is libturbojpeg, as in the loader. For one thread.
    """

    def __init__(self) -> None:
        try:
            self._decompressor = Decompressor()
        except UserError:
            raise UserError(
                "build.decode_check is full, and libturbojpeg is not installed",
                allowed=" or ".join(TURBOJPEG),
                fix="apt-get install libturbojpeg0, or --decode-check header",
            ) from None
        self._pixels = np.empty(0, np.uint8)

    def fault(self, address: int, size: int, width: int, height: int) -> str | None:
        """The decoder's error or warning for the JPEG of `size` bytes at `address`, with the pixels of its header."""
        across, down = -(-width // _CHECK_SHRINK), -(-height // _CHECK_SHRINK)
        if len(self._pixels) < 3 * across * down:
            self._pixels = np.empty(3 * across * down, np.uint8)
        library, handle = self._decompressor.library, ctypes.c_void_p(self._decompressor.handle)
        source, pixels = ctypes.c_void_p(address), ctypes.c_void_p(self._pixels.ctypes.data)
        shape = across, 3 * across, down
        if not library.tjDecompress2(handle, source, ctypes.c_ulong(size), pixels, *shape, RGB, 0):
            return None
        warning = library.tjGetErrorStr2(handle).decode("ascii", "replace")
        return None if any(words in warning for words in _HARMLESS) else warning
