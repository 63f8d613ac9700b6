"""libturbojpeg's decoder, callable from numba without a Python call, so that threads decode side by side.

The library is opened by its own name; the symbols are bound by name, which lets numba keep compiled code on disk.
"""

import ctypes
from ctypes.util import find_library
from functools import cache

import llvmlite.binding as llvm
from numba import types

from labels.errors import UserError

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib")
RGB = 0  # TJPF_RGB

# int tjDecompressHeader3(handle, jpeg, bytes, int* width, int* height, int* subsampling, int* colour space)
tj_header = types.ExternalFunction(
    "tjDecompressHeader3", types.int32(types.uintp, types.uintp, types.uintp, types.uintp, types.uintp, types.uintp, types.uintp)
)
# int tjDecompress2(handle, jpeg, bytes, pixels, width, pitch in bytes, height, pixel format, flags)
tj_decompress = types.ExternalFunction(
    "tjDecompress2",
    types.int32(types.uintp, types.uintp, types.uintp, types.uintp, types.int32, types.int32, types.int32, types.int32, types.int32),
)
# int tjGetErrorCode(handle): 0 a warning, 1 fatal
tj_error = types.ExternalFunction("tjGetErrorCode", types.int32(types.uintp))


@cache
def load_turbojpeg() -> ctypes.CDLL:
    """Open libturbojpeg and make its symbols known to compiled code; must precede the first decode.

    Raises:
        UserError: it is not installed.
    """
    for name in (*_NAMES, find_library("turbojpeg")):
        try:
            library = ctypes.CDLL(name or "")
            llvm.load_library_permanently(name)
        except (OSError, RuntimeError, TypeError):
            continue
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        return library
    raise UserError("libturbojpeg is not installed", allowed=" or ".join(_NAMES), mend="apt-get install libturbojpeg0")


class Decompressor:
    """One TurboJPEG handle; used by one thread at a time, freed with the object."""

    def __init__(self) -> None:
        self._library = load_turbojpeg()
        self.handle: int = self._library.tjInitDecompress()

    def __del__(self) -> None:
        self._library.tjDestroy(self.handle)
