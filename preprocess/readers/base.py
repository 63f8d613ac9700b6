"""What all readers share: rows before tokenizing, faults, files mapped into memory, and where captions are looked for.

Bytes that are in no local file yet (converted images, remote tars, images of tables) go into a worker's ScratchFile, so
that every image of a shard is a span (begin, end) of a mapped file, wherever it came from.
"""

import ctypes
import mmap
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast, get_args

import numpy as np
import pyarrow as pa

from labels.manifest import LABELS
from labels.storage import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
BATCH_ROWS = 32_768
MAX_SIDE = (1 << 31) - 1  # pixels that a row can hold
# What Python's str.strip removes; Arrow's own set lacks the separators 0x1C to 0x1F.
WHITE_SPACE = "".join(char for char in map(chr, range(0x3001)) if char.isspace())
_COPY_BYTES = 8 << 20
_MAP_FAILED = ctypes.c_void_p(-1).value

ROWS = pa.schema(
    [
        *(LABELS.field(name) for name in ("key", "uid", "width", "height")),
        pa.field("caption", pa.string(), nullable=False),
    ]
)
"""One row a sample: key string, uid string?, width and height int32? in pixels, caption string."""


@dataclass(frozen=True)
class Fault:
    """A sample, or the rest of a tar, that cannot be read. `key` is empty where no key is known."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class RowBatch:
    """Rows of schema ROWS in the shard's order, and the samples of the same part of the shard that have no row."""

    table: pa.Table
    faults: list[Fault]


class ScratchFile:
    """Append, then view as an array. The file has no name: it is gone when the process is.

    `folder`: a local folder with room; None takes the system's for temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        file = tempfile.TemporaryFile(dir=folder, buffering=_COPY_BYTES)  # noqa: SIM115  (closed by __exit__)
        self.file = cast(BinaryIO, file)
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, data: bytes) -> tuple[int, int]:
        """Begin and end of `data` in the file."""
        self.file.write(data)
        begin, self.bytes = self.bytes, self.bytes + len(data)
        return begin, self.bytes

    def copy(self, source: BinaryIO) -> None:
        """Append all of another file."""
        shutil.copyfileobj(source, self.file, _COPY_BYTES)
        self.bytes = self.file.tell()

    def view(self) -> np.ndarray:
        """All bytes until now, uint8 [bytes], mapped; valid also after the file is closed."""
        self.file.flush()
        return _map(self.file.fileno(), self.bytes)


def map_file(path: Path) -> np.ndarray:
    """A local file as uint8 [bytes], mapped read-only."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _map(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _map(descriptor: int, size: int) -> np.ndarray:
    if size == 0:
        return np.empty(0, np.uint8)
    # All pages at once: page faults one by one would cost more than the rest.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    # Not mmap.mmap: it keeps a descriptor, and a beton may hold the images of more shards than a process may open.
    address = _system_mmap()(None, size, mmap.PROT_READ, flags, descriptor, 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    buffer: Any = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(buffer, ctypes.CDLL(None).munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)).atexit = False
    data = np.frombuffer(buffer, np.uint8)
    data.flags.writeable = False
    return data


@cache
def _system_mmap() -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True).mmap
    size, number, offset = ctypes.c_size_t, ctypes.c_int, ctypes.c_ssize_t  # off_t of a 64-bit system
    function.argtypes = [ctypes.c_void_p, size, number, number, number, offset]
    function.restype = ctypes.c_void_p
    return function


# -- build.caption_key -> choices, tried in order; the first that a sample has is its caption
#
# txt  json:alt  parquet:text  csv:title    a tar's member, a field of its json, a column of its side Parquet or a table
# txt+json:alt                              one choice of several captions, read as one text
# auto                                      the choices of _AUTO


ColumnKind = Literal["parquet", "csv"]
Kind = Literal["member", "json", ColumnKind]

_TABLE_COLUMNS = ("caption", "text", "txt", "title")
_SUFFIX = re.compile(r"[a-z0-9_][a-z0-9_.-]*")
_ALLOWED = (
    "auto, txt or another member suffix of the tars, json:FIELD, parquet:COLUMN, csv:COLUMN; several joined with + are"
    " one text (e.g. txt,json:alt or txt+json:alt)"
)


@dataclass(frozen=True)
class Item:
    """One source of a caption: kind `member` (name = suffix in a tar), `json` (field), `parquet` or `csv` (column)."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return self.name if self.kind == "member" else f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class Choice:
    """Items that are read together; a sample has the choice if it has any of them."""

    items: tuple[Item, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.items))


# A kind of shard sees only the items that it can have: one list serves tars and tables.
_AUTO = (
    Item("parquet", "caption"),
    Item("member", "txt"),
    Item("json", "caption"),
    *(Item("parquet", name) for name in _TABLE_COLUMNS[1:]),
    *(Item("csv", name) for name in _TABLE_COLUMNS),
)


def parse_caption_key(keys: Sequence[str]) -> tuple[Choice, ...]:
    """The choices, in order, that build.caption_key names; `auto` becomes the choices that it stands for."""
    choices: list[Choice] = []
    for key in keys:
        if key.strip() == "auto":
            choices += [Choice((item,)) for item in _AUTO]
        else:
            choices.append(Choice(tuple(_item(part.strip(), key) for part in key.split("+"))))
    if not choices:
        raise UserError("build.caption_key is empty", allowed=_ALLOWED)
    return tuple(dict.fromkeys(choices))


def _item(text: str, key: str) -> Item:
    kind, colon, name = text.partition(":")
    if colon and name and kind in get_args(Kind)[1:]:
        return Item(kind, name)  # type: ignore[arg-type]  # just compared with the kinds
    suffix = text.lower()  # as suffixes are where tars are read
    if colon or not _SUFFIX.fullmatch(suffix) or suffix == "auto":
        problem = f"{text!r} names no caption"
    elif suffix == "json":
        problem = "'json' lacks the field: json:FIELD"
    elif suffix in IMAGE_SUFFIXES:
        problem = f"{text!r} is the suffix of an image"
    else:
        return Item("member", suffix)
    of_key = f" (in {key!r})" if key != text else ""
    raise UserError(f"build.caption_key: {problem}{of_key}", allowed=_ALLOWED)


def column_choices(choices: Iterable[Choice], kind: ColumnKind) -> tuple[Choice, ...]:
    """What of `choices` a table of this kind can answer: other items are dropped, then choices without any."""
    return narrow_choices(choices, lambda item: item.kind == kind)


def narrow_choices(choices: Iterable[Choice], keep: Callable[[Item], bool]) -> tuple[Choice, ...]:
    """The choices with only the items that are kept; choices without any, and repeated ones, are dropped."""
    narrowed = (Choice(tuple(filter(keep, choice.items))) for choice in choices)
    return tuple(dict.fromkeys(choice for choice in narrowed if choice.items))


def join_captions(texts: Sequence[str]) -> str:
    """Several captions of one sample as one text, a line each."""
    return "\n".join(texts)
