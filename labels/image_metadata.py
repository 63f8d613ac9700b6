"""Image files with damaged metadata keep their pixels: `decode_leniently` opens them, if need be without metadata.

    image file -> read_orientation -> 1 to 8, and whether the EXIF directory is whole
               -> Pillow                                   -> pixels, as of any image
               -> Pillow fails, or the directory is damaged: without_metadata -> Pillow -> the same pixels

Metadata are what decides no pixel: EXIF, XMP, colour profiles, comments, resolutions, animation. Pillow reads them all
and refuses an image for one of them, while libjpeg, libpng and libwebp do not look at them. What decides pixels is kept
as it is, so that a cut or damaged image still fails; PNG's checksums of it are checked, which Pillow omits for IDAT.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from PIL import Image

# Lines of library code between the lines of progress: damaged metadata are counted, and limits of pixels are checked.
warnings.filterwarnings("ignore", module=r"PIL(\.|$)")

T = TypeVar("T")
_ORIENTATION, _XMP = 0x0112, 0x02BC
_FORMATS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WEBP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)


def decode_leniently(
    data: bytes, decode: Callable[[Image.Image, int], T], formats: tuple[str, ...] | None = None
) -> tuple[T, bool]:
    """What `decode` returns for the opened image and its orientation, and whether its metadata are damaged.

    `decode` gets the orientation that is still to be applied, 1 to 8 (Pillow turns TIFFs itself), and may be called a
    second time. Raises what Pillow or `decode` raises at first.
    """
    _check_png(data)
    orientation, damaged = read_orientation(data)
    turn = 1 if _format_of(data) == "TIFF" else orientation
    failure = None
    for version in (without_metadata, bytes) if damaged else (bytes, without_metadata):
        try:
            with Image.open(io.BytesIO(version(data)), formats=formats) as image:
                return decode(image, turn), damaged or version is without_metadata
        except Exception as error:  # Pillow's plugins raise many types
            failure = failure or error
    assert failure is not None
    raise failure


def read_orientation(data: bytes) -> tuple[int, bool]:
    """EXIF's orientation of an image file, 1 (upright) to 8, and whether its EXIF directory is damaged.

    Leniently: by the directory's first entry of the tag, whatever its type and count, or else by XMP.
    """
    exif, xmp = _READERS.get(_format_of(data), lambda _: (b"", b""))(data)
    directory = _directory(exif)
    orientation = next((entry for entry in directory.entries if entry.tag == _ORIENTATION), None)
    damaged = bool(exif) and not directory.whole
    if orientation is not None:
        value = directory.value(orientation)
        return value if 1 <= value <= 8 else 1, damaged or orientation[1:3] != (3, 1)
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found[1]) if found else 1, damaged


def without_metadata(data: bytes) -> bytes:
    """The image file with what decides its pixels alone; of a TIFF also its orientation, since Pillow turns it."""
    return _STRIPPERS.get(_format_of(data), bytes)(data)


def _format_of(data: bytes) -> str:
    return next((name for start, name in _FORMATS if data.startswith(start)), "")


# -- EXIF and TIFF: a directory of entries

_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)  # of one value of each type
_WHOLE_NUMBERS = {1: "B", 4: "L", 6: "B", 7: "B", 9: "L", 13: "L"}  # any other type is read as the usual one, SHORT
# Width, height, coding, colours, strips and tiles.
_TIFF_SHAPE = {*range(254, 260), 262, 263, 266, 273, *range(277, 280), 284, *range(322, 326), 332, 334}
_TIFF_PIXELS = _TIFF_SHAPE | {292, 293, 317, 320, *range(338, 342), 347, *range(512, 522), *range(529, 533)}


class _Entry(NamedTuple):
    tag: int
    kind: int
    count: int
    value: bytes  # or the offset of the values, 4 bytes


class _Directory(NamedTuple):
    order: str  # of bytes: "<" or ">"
    entries: list[_Entry]
    whole: bool  # all entries are there, and their values

    def value(self, entry: _Entry) -> int:
        return struct.unpack_from(self.order + _WHOLE_NUMBERS.get(entry.kind, "H"), entry.value)[0]


def _directory(block: bytes) -> _Directory:
    """The first directory of a TIFF file or an EXIF block."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2], "")
    if not order or len(block) < 8:
        return _Directory(order, [], False)
    begin = struct.unpack_from(order + "L", block, 4)[0]
    if begin + 2 > len(block):
        return _Directory(order, [], False)
    number = struct.unpack_from(order + "H", block, begin)[0]
    rows = block[begin + 2 : begin + 2 + 12 * number]
    entries = [_Entry(*row) for row in struct.iter_unpack(order + "HHL4s", rows[: len(rows) // 12 * 12])]
    cut = begin + 2 + 12 * number + 4 > len(block)  # the offset of the next directory follows
    return _Directory(order, entries, not cut and all(_is_inside(block, order, row) for row in entries))


def _is_inside(block: bytes, order: str, entry: _Entry) -> bool:
    size = entry.count * (_BYTES[entry.kind] if entry.kind < len(_BYTES) else 0)
    return size <= 4 or struct.unpack(order + "L", entry.value)[0] + size <= len(block)


def _read_tiff(data: bytes) -> tuple[bytes, bytes]:
    order, entries, _ = _directory(data)
    for entry in entries:
        if entry.tag == _XMP and entry.count > 4:
            begin = struct.unpack(order + "L", entry.value)[0]
            return data, data[begin : begin + entry.count]
    return data, b""


def _strip_tiff(data: bytes) -> bytes:
    """Point to a new directory behind the file."""
    order, entries, _ = _directory(data)
    orientation = read_orientation(data)[0]
    kept = [entry for entry in entries if entry.tag in _TIFF_PIXELS]
    kept.append(_Entry(_ORIENTATION, 3, 1, struct.pack(order + "H2x", orientation)))
    rows = b"".join(struct.pack(order + "HHL4s", *entry) for entry in sorted(kept, key=lambda entry: entry.tag))
    padded = data[8:] + bytes(len(data) % 2)
    directory = struct.pack(order + "H", len(kept)) + rows + bytes(4)
    return data[:4] + struct.pack(order + "L", 8 + len(padded)) + padded + directory


# -- JPEG: segments

_EXIF, _XMP_NAME = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_NO_LENGTH = frozenset([0x01, *range(0xD0, 0xD8)])


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, and begin and end with the marker, of each segment; the last one has all from the first scan on.

    As libjpeg looks for them: bytes between two segments are skipped.
    """
    position = 2
    while True:
        position = data.find(b"\xff", position)
        while position >= 0 and data[position + 1 : position + 2] == b"\xff":
            position += 1
        if position < 0 or position + 4 > len(data):
            return
        marker = data[position + 1]
        if marker == 0 or marker in _NO_LENGTH:
            position += 2
            continue
        if not (0xC0 <= marker <= 0xFE) or marker in (0xD8, 0xD9, 0xDA):
            yield marker, position, len(data)
            return
        end = position + 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
        yield marker, position, end
        position = end


def _read_jpeg(data: bytes) -> tuple[bytes, bytes]:
    exif, xmp = b"", b""
    for marker, begin, end in _jpeg_segments(data):
        if marker == 0xE1 and data.startswith(_EXIF, begin + 4):
            exif += data[begin + 4 + len(_EXIF) : end]  # a long block is in several segments
        elif marker == 0xE1 and data.startswith(_XMP_NAME, begin + 4):
            xmp = data[begin:end]
    return exif.removeprefix(_EXIF), xmp


def _strip_jpeg(data: bytes) -> bytes:
    """Of the application segments only the two that libjpeg reads: JFIF and Adobe's, which decide the colours."""

    def decides(marker: int, begin: int, end: int) -> bool:
        if marker == 0xE0:
            return data.startswith(b"JFIF\0", begin + 4) and end - begin >= 18
        if marker == 0xEE:
            return data.startswith(b"Adobe", begin + 4) and end - begin >= 16
        return marker != 0xFE and not 0xE0 <= marker <= 0xEF

    return data[:2] + b"".join(data[part[1] : part[2]] for part in _jpeg_segments(data) if decides(*part))


# -- PNG: chunks

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RAW_EXIF, _XMP_KEY = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"
_MOST_TEXT = 1 << 20  # bytes of an unpacked text: more is no EXIF


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, and begin and end of the whole chunk, which may end behind the data."""
    position = len(_SIGNATURE)
    while position + 8 <= len(data):
        name, end = (
            data[position + 4 : position + 8],
            position + 12 + int.from_bytes(data[position : position + 4], "big"),
        )
        yield name, position, end
        position = end


def _decides_pixels(name: bytes) -> bool:
    return not name[0] & 0x20 or name == b"tRNS"


def _check_png(data: bytes) -> None:
    """OSError: a chunk that decides pixels has a wrong checksum."""
    if not data.startswith(_SIGNATURE):
        return
    for name, begin, end in _png_chunks(data):
        if end <= len(data) and _decides_pixels(name):
            stored = int.from_bytes(data[end - 4 : end], "big")
            if zlib.crc32(memoryview(data)[begin + 4 : end - 4]) != stored:
                raise OSError(f"wrong checksum in the PNG chunk {name.decode('latin-1')}")
        if name == b"IEND":
            return


def _read_png(data: bytes) -> tuple[bytes, bytes]:
    exif, raw, xmp = b"", b"", b""
    for name, begin, end in _png_chunks(data):
        content = data[begin + 8 : end - 4] if name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") else b""
        if name == b"eXIf":
            exif = content
        elif content.startswith(_RAW_EXIF):
            raw = _text(name, content)
        elif content.startswith(_XMP_KEY):
            xmp = _text(name, content)
    if not exif and raw:  # name, length and hexadecimal digits, each from a new line on
        digits = re.sub(rb"[^0-9A-Fa-f]", b"", b"".join(raw.split(b"\n")[3:]))
        exif = bytes.fromhex(digits[: len(digits) // 2 * 2].decode())
    return exif.removeprefix(_EXIF), xmp


def _text(name: bytes, content: bytes) -> bytes:
    """The text behind the keyword of a text chunk."""
    packed, text = name == b"zTXt", content.partition(b"\0")[2]
    if packed:
        text = text[1:]
    elif name == b"iTXt":
        packed, text = text[:1] == b"\1", text[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return zlib.decompressobj().decompress(text, _MOST_TEXT) if packed else text
    except zlib.error:
        return b""


def _strip_png(data: bytes) -> bytes:
    kept = (data[begin:end] for name, begin, end in _png_chunks(data) if _decides_pixels(name))
    return _SIGNATURE + b"".join(kept)


# -- GIF: extensions before the first picture


def _strip_gif(data: bytes) -> bytes:
    """Of the extensions only the graphic control, which names the transparent colour."""
    flags = data[10] if len(data) > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept = [data[:position]]
    while data[position : position + 1] == b"!":
        end = position + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
        end += 1
        if data[position + 1 : position + 2] == b"\xf9":
            kept.append(data[position:end])
        position = end
    return b"".join(kept) + data[position:]


# -- WebP: chunks of a RIFF file

_ICC_FLAG, _EXIF_FLAG, _XMP_FLAG = 0x20, 0x08, 0x04
_WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, size and content of each chunk; the content of the last may be cut."""
    position = 12
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        yield name, size, data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2


def _read_webp(data: bytes) -> tuple[bytes, bytes]:
    exif, xmp, flags = b"", b"", data[20] if data[12:16] == b"VP8X" and len(data) > 20 else 0
    for name, _, content in _webp_chunks(data) if flags & (_EXIF_FLAG | _XMP_FLAG) else ():
        if name == b"EXIF" and flags & _EXIF_FLAG:
            exif = exif or content
        elif name == b"XMP " and flags & _XMP_FLAG:
            xmp = xmp or content
    return exif.removeprefix(_EXIF), xmp


def _strip_webp(data: bytes) -> bytes:
    kept, total = b"", 4
    for name, size, content in _webp_chunks(data):
        if name == b"VP8X" and content:
            content = bytes([content[0] & ~(_ICC_FLAG | _EXIF_FLAG | _XMP_FLAG)]) + content[1:]
        if name in _WEBP_PIXELS:
            kept += name + struct.pack("<L", size) + content + bytes(size % 2 if len(content) == size else 0)
            total += 8 + size + size % 2
    return b"RIFF" + struct.pack("<L", total & 0xFFFFFFFF) + b"WEBP" + kept


_READERS: dict[str, Callable[[bytes], tuple[bytes, bytes]]] = {  # EXIF block and XMP text, empty if there is none
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WEBP": _read_webp,
    "TIFF": _read_tiff,
}
_STRIPPERS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": _strip_jpeg,
    "PNG": _strip_png,
    "GIF": _strip_gif,
    "WEBP": _strip_webp,
    "TIFF": _strip_tiff,
}
