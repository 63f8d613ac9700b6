"""Small JPEGs of images, for pages that hold many of them."""

import io

from PIL import Image


def thumbnail(data: bytes, side: int) -> bytes | None:
    """The image scaled down to at most `side` pixels a side, as JPEG; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (side, side))
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()
