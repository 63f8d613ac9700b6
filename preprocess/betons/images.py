"""Image bytes for a beton: a plain RGB JPEG goes in as it is, anything else is converted once."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps, UnidentifiedImageError

from labels.settings import Build, ShorterSide
from preprocess.jpegs import MAX_SIDE, Jpeg, jpeg_header

_JPEG_START = b"\xff\xd8\xff"
_END_OF_IMAGE = b"\xff\xd9"
_ORIENTATION = 0x0112
_TURNED, _SIDEWAYS = range(2, 9), range(5, 9)
# Not all that PIL knows: some of its formats start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# A JPEG that is shrunk is decoded at a fraction of its size, but not below so many times what is wanted.
_DRAFT = 2


class BadImage(Exception):
    """Bytes that give no image. `reason` is a counted class, the text the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def prepare(data: bytes, settings: Build) -> tuple[bytes, int, int]:
    """The JPEG bytes that go into the beton, with width and height in pixels.

    Plain RGB JPEGs (8 bits, 3 components, upright, with their end mark) that are not to be shrunk are returned untouched. The rest is
    decoded and written as JPEG: transparency on white, EXIF orientation applied, 16-bit and palette images reduced.

    Raises:
        BadImage: no image, cut short, or more than `max_pixels` pixels.
    """
    header = jpeg_header(data)
    if header is not None:
        _check_size(header.width, header.height, settings.max_pixels)
        if is_plain(data, header, settings):
            return data, header.width, header.height
    image = _decode(data, settings)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=settings.jpeg_quality, subsampling=settings.jpeg_subsampling)
    return buffer.getvalue(), image.width, image.height


def lying(data: bytes, settings: Build) -> tuple[int, int]:
    """Width and height of an image that stays in its tar (`--no-images`), where nothing can be converted.

    Raises:
        BadImage: it is no plain RGB JPEG, or `prepare` would refuse it.
    """
    header = jpeg_header(data)
    if header is not None:
        _check_size(header.width, header.height, settings.max_pixels)
        if is_plain(data, header, settings):
            return header.width, header.height
    with _words_for_faults(data), _open(data) as image:
        found = f"{image.format} {image.mode}, {image.width} x {image.height}, orientation {image.getexif().get(_ORIENTATION, 1)}"
        if header is not None and header.plain and data.find(_END_OF_IMAGE, header.frame_at) < 0:
            image.load()  # tells what is missing
            found += ", without its end mark"
    raise BadImage("not a plain JPEG", f"{found}; with --no-images only upright 8-bit RGB JPEGs can be read where they lie")


def is_plain(data: bytes, header: Jpeg, settings: Build) -> bool:
    """Whether a beton takes this JPEG byte for byte."""
    if isinstance(settings.images, ShorterSide) and min(header.width, header.height) > settings.images.shorter_side:
        return False
    complete = settings.decode_check == "none" or data.find(_END_OF_IMAGE, header.frame_at) >= 0
    return header.plain and complete and not (header.exif and _orientation(data) in _TURNED)


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
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadImage("too many pixels", f"{width} x {height}; allowed: {max_pixels} pixels, {MAX_SIDE} a side")


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


@contextmanager
def _words_for_faults(data: bytes) -> Iterator[None]:
    """PIL's plugins raise many types on damaged bytes; each becomes a BadImage."""
    known = data.startswith(_JPEG_START)
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:  # its own text holds an address in memory, another one every time
        reason = "image cut or damaged" if known else "not an image"
        raise BadImage(reason, f"none of {', '.join(_FORMATS)} by its first bytes") from None
    except Exception as error:
        raise BadImage("image cut or damaged", f"{type(error).__name__}: {error}") from None


def _decode(data: bytes, settings: Build) -> Image.Image:
    """Decode to upright RGB on white, shrunk if that is asked for."""
    with _words_for_faults(data), _open(data) as image:
        _check_size(*image.size, settings.max_pixels)
        wanted = _wanted_size(*image.size, settings)
        shrunk = wanted != image.size
        if shrunk:
            image.draft(None, (_DRAFT * wanted[0], _DRAFT * wanted[1]))
        image.load()
        sideways = image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
        plain = _plain(image)
        width, height = wanted[::-1] if sideways else wanted
        return plain.resize((width, height), Image.Resampling.BICUBIC) if shrunk else plain


def _wanted_size(width: int, height: int, settings: Build) -> tuple[int, int]:
    """Pixels of an image in the beton: only ever fewer, with the same shape."""
    if not isinstance(settings.images, ShorterSide) or min(width, height) <= settings.images.shorter_side:
        return width, height
    share = settings.images.shorter_side / min(width, height)
    return round(width * share), round(height * share)


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
