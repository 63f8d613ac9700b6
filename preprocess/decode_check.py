"""`build.decode_check: full`: every plain JPEG is decoded once, at an eighth of its size; what the decoder warns of is a fault.

PIL says nothing of damage in the middle of a JPEG, so the decoder is libturbojpeg, the loader's own.
"""

import ctypes
from ctypes.util import find_library
from functools import cache

import numpy as np

from labels.errors import UserError

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib")
_RGB = 0  # TJPF_RGB
_SHRINK = 8
# Warnings of libjpeg that leave every pixel as it was meant (jerror.h: EXTRANEOUS_DATA, JFIF_MAJOR, ADOBE_XFORM, BOGUS_PROGRESSION).
_HARMLESS = ("extraneous bytes before marker", "JFIF revision", "Adobe color transform", "Inconsistent progression")


class DecodeCheck:
    """One decoder, for one thread.

    Raises:
        UserError: libturbojpeg is not installed.
    """

    def __init__(self) -> None:
        self._library = load_library()
        self._handle = ctypes.c_void_p(self._library.tjInitDecompress())
        self._pixels = np.empty(0, np.uint8)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.tjDestroy(self._handle)

    def fault(self, address: int, size: int, width: int, height: int) -> str | None:
        """What the decoder says of the JPEG of `size` bytes at `address`; None if it is sound. `width`, `height`: in its header."""
        across, down = -(-width // _SHRINK), -(-height // _SHRINK)
        if len(self._pixels) < 3 * across * down:
            self._pixels = np.empty(3 * across * down, np.uint8)
        failed = self._library.tjDecompress2(
            self._handle, ctypes.c_void_p(address), ctypes.c_ulong(size), ctypes.c_void_p(self._pixels.ctypes.data),
            across, 3 * across, down, _RGB, 0,
        )  # fmt: skip
        if not failed:
            return None
        told = self._library.tjGetErrorStr2(self._handle).decode("ascii", "replace")
        return None if any(words in told for words in _HARMLESS) else told


@cache
def load_library() -> ctypes.CDLL:
    """libturbojpeg.

    Raises:
        UserError: it is not installed.
    """
    for name in (*_NAMES, find_library("turbojpeg")):
        if name is None:
            continue
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        library.tjGetErrorStr2.restype = ctypes.c_char_p
        library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
        return library
    raise UserError(
        "build.decode_check is full, and libturbojpeg is not installed",
        allowed=" or ".join(_NAMES),
        mend="apt-get install libturbojpeg0, or --decode-check header",
    )
