"""Image bytes -> pixels, the same for every encoder. S image side.

bytes -> PIL (RGB, alpha on white) -> shorter side to S, bicubic, centre crop -> uint8 [S, S, 3]
plain JPEGs -> plain_jpeg.py: the same pixels within two levels, compiled
"""

from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image

from labels.errors import UserError

TRANSFORM = "RGB, alpha on white, shorter side to image_size (bicubic, antialiased: PIL's, for plain JPEGs within two levels), centre crop"
_JPEG_START = b"\xff\xd8"
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of RandomResizedCrop: shares of the area, width to height."""
DECODE_FAULTS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for bytes that are no whole image."""


def decode(encoded: bytes, side: int) -> np.ndarray:
    """Image bytes of any kind that Pillow reads -> uint8 [S, S, 3]: shorter side to S, bicubic, centre crop.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: Pillow's own, for bytes that are no whole image.
    """
    plain = _plain_jpeg(encoded, side, None)
    if plain is not None:
        return plain
    with Image.open(BytesIO(encoded)) as image:
        image.draft(None, (2 * side, 2 * side))  # lets the JPEG decoder halve big images, never below twice the side
        rgb = _to_rgb(image)
    short = min(rgb.size)
    left, top = (rgb.width - short) / 2, (rgb.height - short) / 2
    return _resize(rgb, side, (left, top, left + short, top + short))


def decode_crop(encoded: bytes, side: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """The same with RandomResizedCrop (area 0.08 to 1, aspect 3/4 to 4/3) and a flip of one half: uint8 [S, S, 3].

    The crop is a function of (seed, epoch, index) alone.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: as for `decode`.
    """
    plain = _plain_jpeg(encoded, side, (seed, epoch, index))
    if plain is not None:
        return plain
    from train.data.crops import flipped, random_crop  # compiled: only for those who augment

    with Image.open(BytesIO(encoded)) as image:
        rgb = _to_rgb(image)
    left, top, width, height = random_crop(rgb.width, rgb.height, CROP_SCALE, CROP_RATIO, seed, epoch, index)
    pixels = _resize(rgb, side, (left, top, left + width, top + height))
    return pixels[:, ::-1] if flipped(seed, epoch, index) else pixels


def _plain_jpeg(encoded: bytes, side: int, crop: tuple[int, int, int] | None) -> np.ndarray | None:
    """As decode_plain_jpeg; None also for what is no JPEG, and where libturbojpeg is missing: Pillow gives these pixels slower."""
    if not encoded.startswith(_JPEG_START) or not _turbojpeg():
        return None
    from train.evals.plain_jpeg import decode_plain_jpeg  # compiled: only for those who have JPEGs

    return decode_plain_jpeg(encoded, side, crop)


@cache
def _turbojpeg() -> bool:
    from labels.native import load_turbojpeg

    try:
        load_turbojpeg()
    except UserError:
        return False
    return True


def _resize(rgb: Image.Image, side: int, box: tuple[float, float, float, float]) -> np.ndarray:
    return np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC, box=box))


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey keeps its high byte (Pillow would clip it), transparency is laid on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")
