"""For the compiled code of both stages: numba's cache, libturbojpeg's decoder, SplitMix64.

numba caches the machine code of a function with `cache=True` until the function's *own* file changes, but ignores the
files whose functions and constants are compiled into it. `njit` of this module is numba's, with a cache locator for our
packages that stamps all of them:

    decode.py: @njit(cache=True) -> decode.py and all files that it imports, directly or not -> stamp -> __pycache__
"""

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types  # pyright: ignore[reportPrivateImportUsage]  (numba documents it there)
from numba.core.caching import CacheImpl, _CacheLocator

from labels.storage import UserError

_ROOT = Path(__file__).resolve().parent.parent
TEMPORARY_CACHE = "superclass-numba-"
_PACKAGES = ("labels", "preprocess", "train")
_IMPORT = re.compile(rf"^from ((?:{'|'.join(_PACKAGES)})\b[\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)
_config: Any = numba.config  # pyright: ignore[reportPrivateImportUsage]


class SourceLocator(_CacheLocator):
    """Where the machine code of one of our functions is cached, and the stamp of the sources that it is valid for."""

    def __init__(self, py_func: Callable[..., Any], py_file: str) -> None:
        self._py_file, self._line = py_file, py_func.__code__.co_firstlineno
        self._folder = cache_folder(os.path.dirname(py_file))

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> "SourceLocator | None":
        """None for a function of another library, or without a source file: numba tries its own locators next."""
        file = Path(py_file).resolve()
        ours = file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in _PACKAGES and file.is_file()
        return cls(py_func, str(file)) if ours else None

    def get_cache_path(self) -> str:
        return self._folder or ""  # never without one: see njit

    def get_source_stamp(self) -> str:
        return source_stamp(Path(self._py_file))

    def get_disambiguator(self) -> str:
        return str(self._line)


@cache
def source_stamp(file: Path) -> str:
    """SHA-256 of the contents of a source file of our packages and of all that it imports from them, directly or not.

    Contents, not times and sizes: a checkout changes all times, and an edit may keep the size.
    """
    files, waiting = {file}, [file]
    while waiting:
        imported = _read_source(waiting.pop())[1] - files
        files |= imported
        waiting += imported
    digests = [(str(path.relative_to(_ROOT)), _read_source(path)[0]) for path in sorted(files)]
    return hashlib.sha256(repr(digests).encode()).hexdigest()


@cache
def _read_source(file: Path) -> tuple[str, frozenset[Path]]:
    """A file's SHA-256, and the files of our packages that it imports at its top level (parsing takes 3 ms each)."""
    source = file.read_bytes()
    modules = set()
    for module, names in _IMPORT.findall(source.decode()):
        path = module.replace(".", "/")
        modules |= {path, f"{path}/__init__"}
        if os.path.isdir(_ROOT / path):  # from package import module
            modules |= {f"{path}/{name}" for name in re.findall(r"\w+", names)}
    paths = (_ROOT / f"{module}.py" for module in modules)
    return hashlib.sha256(source).hexdigest(), frozenset(path for path in paths if path.is_file())


@cache
def cache_folder(folder: str = str(_ROOT / "labels")) -> str | None:
    """The first writable cache folder for the functions of the files in `folder`; None: they are compiled every time.

    NUMBA_CACHE_DIR, else `folder`/__pycache__, else one in the user's cache folder, else in that of temporary files.
    """
    for path in _cache_folders(folder):
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError:
            continue
        return str(path)
    return None


def _cache_folders(folder: str) -> Iterator[Path]:
    unique = SourceLocator.get_suitable_cache_subpath(os.path.join(folder, "any.py"))
    if _config.CACHE_DIR:
        yield Path(_config.CACHE_DIR, unique)
    yield Path(folder, "__pycache__")
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if user.is_absolute():  # without HOME it may be "~"
        yield user / "superclass" / "numba" / unique
    try:
        temporary = Path(tempfile.gettempdir(), f"{TEMPORARY_CACHE}{os.getuid()}")
        temporary.mkdir(mode=0o700, exist_ok=True)
        status = temporary.lstat()  # compiled code is run: no other user may have written it
    except OSError:
        return
    if status.st_uid == os.getuid() and status.st_mode & 0o170077 == 0o040000:
        yield temporary / unique


# The setting CACHE_LOCATOR_CLASSES of newer versions, if it is set, replaces numba's list.
CacheImpl._locator_classes.insert(0, SourceLocator)
if getattr(_config, "CACHE_LOCATOR_CLASSES", ""):
    _config.CACHE_LOCATOR_CLASSES = f"{__name__}.{SourceLocator.__name__},{_config.CACHE_LOCATOR_CLASSES}"


def njit(*arguments: Any, **options: Any) -> Any:
    """numba's decorator; with `cache=True`, for which numba refuses to work without a folder, only if there is one."""
    if not options.get("cache"):
        return numba.njit(*arguments, **options)  # noqa: TID251

    def decorate(function: Callable[..., Any]) -> Any:
        folder = cache_folder(str(Path(function.__code__.co_filename).resolve().parent))
        return numba.njit(*arguments, **options | {"cache": folder is not None})(function)  # noqa: TID251

    return decorate


def splitmix64(value: Any) -> Any:
    """SplitMix64's finaliser (Steele et al., 2014) of a uint64, or of each in a NumPy array."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's step between the states of neighbouring draws: 2**64 over the golden ratio."""
mix = njit(inline="always")(splitmix64)
"""`splitmix64` for compiled code."""

TURBOJPEG = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib")
RGB = 0  # TJPF_RGB

# Bound by name, not by address, so that numba can cache the callers. No call holds the interpreter's lock.
# int tjDecompressHeader3(handle, jpeg, bytes, int* width, int* height, int* subsampling, int* colour space)
tj_header = types.ExternalFunction("tjDecompressHeader3", types.int32(*[types.uintp] * 7))
# int tjDecompress2(handle, jpeg, bytes, pixels, width, pitch in bytes, height, pixel format, flags)
tj_decompress = types.ExternalFunction("tjDecompress2", types.int32(*[types.uintp] * 4, *[types.int32] * 5))
# int tjGetErrorCode(handle): 0 a warning, 1 fatal
tj_error = types.ExternalFunction("tjGetErrorCode", types.int32(types.uintp))


@cache
def load_turbojpeg() -> ctypes.CDLL:
    """Open libturbojpeg, so that compiled code finds its symbols; needed before the first decode."""
    for name in (*TURBOJPEG, find_library("turbojpeg")):
        try:
            library = ctypes.CDLL(name or "")
            llvm.load_library_permanently(name)
        except (OSError, RuntimeError, TypeError):
            continue
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
        library.tjGetErrorStr2.restype = ctypes.c_char_p
        return library
    fix = "apt-get install libturbojpeg0"
    raise UserError("libturbojpeg is not installed", allowed=" or ".join(TURBOJPEG), fix=fix)


class Decompressor:
    """One TurboJPEG handle, for one thread at a time, freed with the object."""

    def __init__(self) -> None:
        self.library = load_turbojpeg()
        self.handle: int = self.library.tjInitDecompress()

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.library.tjDestroy(self.handle)
