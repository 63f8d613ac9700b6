"""Turns a clip art PNG into the JPEG that goes into a shard.

    PNG header -> pixel limit -> decode -> alpha composited on white -> longest side at most 512 -> JPEG

What cannot be used (too large, unreadable, blank) is refused with the reason, for the caller to count.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MAX_SIDE = 512
# Clip art is sharp colour edges, where JPEG shows first: quality 90 with full-resolution colour (4:4:4) is clean, and
# the files are still small (about 15 kB).
JPEG_QUALITY = 90
# A decoded pixel takes 4 bytes, its alpha 1 and its composite 4, so this limit keeps a worker under 0.5 GB.
# Sixteen drawings of the archive are above it (105 to 623 million pixels); the next largest has 41 million.
MAX_PIXELS = 50_000_000

WHITE = (255, 255, 255)
ALL_WHITE = ((255, 255),) * 3


class SkippedImageError(Exception):
    """The image cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Picture:
    """A finished JPEG and the sizes before and after."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def open_checked(path: Path) -> Image.Image:
    """Opens an image, reading only its header, and refuses it if decoding would take too much memory."""
    with warnings.catch_warnings():
        # Pillow's own decompression-bomb guard stays on; what it only warns about is refused as well.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(path, formats=["PNG"])
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise SkippedImageError("too_many_pixels") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise SkippedImageError("unreadable_image") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise SkippedImageError("too_many_pixels")
    return image


def on_white(image: Image.Image) -> Image.Image:
    """Composites the image on white, as a page would show it; palette transparency counts as alpha."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    # convert() copies even when there is nothing to convert, and a copy of the largest takes 160 MB.
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    background = Image.new("RGB", image.size, WHITE)
    background.paste(rgba, mask=rgba.getchannel("A"))
    return background


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """Scales down so that the longest side is at most `max_side`; never enlarges."""
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # reducing_gap: box-average the huge ones to 3 times the target first, which is quick and looks the same.
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def make_picture(path: Path, max_side: int = MAX_SIDE) -> Picture:
    """Decodes, composites, scales and encodes one PNG."""
    with open_checked(path) as image:
        original_width, original_height = image.size
        try:
            flat = on_white(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise SkippedImageError("unreadable_image") from error
    # Where the package's renderer failed (nearly all of the archive's gradients) the PNG is wholly transparent.
    if flat.getextrema() == ALL_WHITE:
        raise SkippedImageError("blank_image")
    small = shrink(flat, max_side)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Picture(buffer.getvalue(), small.width, small.height, original_width, original_height)
