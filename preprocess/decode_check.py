"""`build.decode_check: full`: every plain JPEG is decoded once, at an eighth of its size; what the decoder warns of is a fault.

PIL says nothing of damage in the middle of a JPEG, so the decoder is libturbojpeg, the loader's own.
"""

import ctypes

import numpy as np

from labels.errors import UserError
from labels.native import RGB, TURBOJPEG, Decompressor

_SHRINK = 8
# Warnings of libjpeg that leave every pixel as it was meant (jerror.h: EXTRANEOUS_DATA, JFIF_MAJOR, ADOBE_XFORM, BOGUS_PROGRESSION).
_HARMLESS = ("extraneous bytes before marker", "JFIF revision", "Adobe color transform", "Inconsistent progression")


class DecodeCheck:
    """One decoder, for one thread.

    Raises:
        UserError: libturbojpeg is not installed.
    """

    def __init__(self) -> None:
        try:
            self._decompressor = Decompressor()
        except UserError:
            raise UserError(
                "build.decode_check is full, and libturbojpeg is not installed",
                allowed=" or ".join(TURBOJPEG),
                mend="apt-get install libturbojpeg0, or --decode-check header",
            ) from None
        self._pixels = np.empty(0, np.uint8)

    def fault(self, address: int, size: int, width: int, height: int) -> str | None:
        """What the decoder says of the JPEG of `size` bytes at `address`; None if it is sound. `width`, `height`: in its header."""
        across, down = -(-width // _SHRINK), -(-height // _SHRINK)
        if len(self._pixels) < 3 * across * down:
            self._pixels = np.empty(3 * across * down, np.uint8)
        library, handle, pixels = self._decompressor.library, ctypes.c_void_p(self._decompressor.handle), self._pixels.ctypes.data
        failed = library.tjDecompress2(
            handle, ctypes.c_void_p(address), ctypes.c_ulong(size), ctypes.c_void_p(pixels), across, 3 * across, down, RGB, 0
        )
        if not failed:
            return None
        warning = library.tjGetErrorStr2(handle).decode("ascii", "replace")
        return None if any(words in warning for words in _HARMLESS) else warning
