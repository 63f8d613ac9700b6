"""A fuzz run over image files: random EXIF blocks, segments and chunks in images whose pixels are known.

    python tests/helpers/fuzz_images.py --inputs 25000 [--seed 0]

Every image whose pixel data are whole has to be kept, with these pixels, turned as its EXIF block says, also where
Pillow itself refuses the file; an image whose pixel data are cut or damaged is rejected with a reason, or kept with all
of its pixels. Pillow with LOAD_TRUNCATED_IMAGES, which reads past damaged metadata, is the independent reader.
"""

import ctypes
import io
import random
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from fuzz_runs import check_all, main
from labels.native import RGB, Decompressor
from labels.settings import Build
from preprocess.betons.images import BadImage, prepare
from shard_factory import encode, pixels

SETTINGS, DECOMPRESSOR = Build(), Decompressor()
MODES = ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"]
TURNS = [None, None, *(Image.Transpose(turn) for turn in (0, 3, 1, 5, 4, 6, 2))]
KINDS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}  # types of whole numbers


class Input(NamedTuple):
    """An image file of which everything is known."""

    form: str
    data: bytes
    clean: bytes  # the file without metadata
    orientation: int
    whole: bool  # its pixel data are


@cache
def image_file(form: str, mode: str, number: int) -> bytes:
    """A clean image file."""
    image = Image.fromarray(pixels(number, 12, 9)).resize((41, 23), Image.Resampling.BICUBIC).convert(mode)
    return encode(image, form)


def exif_block(draw: random.Random) -> tuple[bytes, int]:
    """An EXIF block, often malformed, and the orientation that can be read from it (1 if none)."""
    order = draw.choice("<>")
    number = draw.randrange(1, 9)
    mark = draw.choice([42, 42, 42, 42, 43, draw.randrange(1 << 16)])
    first = draw.choice([8, 8, 8, 9, 26, 1 << 20, 0xFFFFFFFF])
    entries = [
        struct.pack(
            order + "HHLL",
            draw.choice([0x10F, 0x11A, 0x11B, 0x128, 0x131, 0x8769, 0x8825, 0xA005, draw.randrange(0x113, 1 << 16)]),
            draw.choice([*range(1, 14), 0, 129, draw.randrange(1 << 16)]),
            draw.choice([0, 1, 1, 2, 4, 9, 1000, 0xFFFFFFFF]),
            draw.choice([0, 8, 30, 60, 0xFFFFFFF0, draw.randrange(1 << 32)]),
        )
        for _ in range(number)
    ]
    value, kind = draw.choice([*range(1, 9), *range(1, 9), 0, 9, 255]), draw.choice([3, 3, 3, 3, *KINDS, 0, 5, 2, 999])
    code = KINDS.get(kind, "H")
    value = min(value, 127) if code == "b" else value
    content = struct.pack(order + code, value).ljust(4, b"\0")
    row = draw.randrange(number)
    entries[row] = struct.pack(order + "HHL", 0x112, kind, draw.choice([1, 1, 1, 0, 2, 3, 0xFFFFFFFF])) + content
    claimed = draw.choice([number, number, number, 0xFFFF, draw.randrange(number + 1)])
    block = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", mark, first)
    block += draw.randbytes(max(0, min(first, 64) - 8)) + struct.pack(order + "H", claimed)
    begin = len(block)
    block += b"".join(entries) + draw.choice([b"", struct.pack(order + "L", draw.choice([0, 8, first]))])
    block += draw.randbytes(draw.choice([0, 0, 40, 300]))
    if draw.random() < 0.15:
        block = block[: draw.randrange(len(block))]
    if draw.random() < 0.05:
        return draw.randbytes(2) + b"x" * draw.randrange(40), 1
    visible = first + 2 == begin and row < claimed and begin + 12 * (row + 1) <= len(block)
    return block, value if visible and 1 <= value <= 8 else 1


# -- formats: a clean file -> one with metadata, the orientation in them, offsets at which its pixel data may be cut


def jpeg_with(draw: random.Random, clean: bytes) -> tuple[bytes, int]:
    segments: list[tuple[int, bytes]] = []
    block, orientation = exif_block(draw)
    profile = b"ICC_PROFILE\0" + bytes([draw.randrange(4), draw.randrange(4)]) + draw.randbytes(20)
    for _ in range(draw.randrange(4)):
        marker, content = draw.choice(
            [
                (0xE2, profile),
                (0xE2, b"MPF\0" + exif_block(draw)[0]),
                (0xED, b"Photoshop 3.0\0" + b"8BIM" * draw.randrange(2) + draw.randbytes(draw.randrange(20))),
                (0xEE, b"Adobe" + draw.randbytes(draw.randrange(6))),
                (0xE0, b"JFIF\0" + draw.randbytes(draw.randrange(5))),
                (0xFE, draw.randbytes(draw.randrange(30))),
                (draw.choice([0xE3, 0xE7, 0xEF]), draw.randbytes(draw.randrange(30))),
            ]
        )
        segments.append((marker, content))
    if draw.random() < 0.8:
        segments.insert(draw.randrange(len(segments) + 1), (0xE1, b"Exif\0\0" + block))
    else:
        orientation = 1
    added = b"".join(
        b"\xff" * draw.choice([1, 1, 1, 3]) + struct.pack(">BH", marker, len(content) + 2) + content
        for marker, content in segments
    )
    if draw.random() < 0.1:
        added += b"\xff\xe5\0" + bytes([draw.randrange(2)])  # a length that does not count itself
    if added and draw.random() < 0.1:
        added += bytes(byte for byte in draw.randbytes(9) if byte != 0xFF)  # a segment longer than its length
    return clean[:2] + added + clean[2:], orientation


def png_chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """A chunk; its own checksum if None."""
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", checksum)


def png_with(draw: random.Random, clean: bytes) -> tuple[bytes, int]:
    chunks: list[tuple[bytes, bytes]] = []
    names = [b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"acTL", b"fcTL", b"fdAT", b"bKGD", b"sBIT", b"tIME", b"hIST", b"vpAg"]
    for _ in range(draw.randrange(4)):
        large = b"t" * draw.choice([9, 9, 2_000_000])
        packed = zlib.compress(large)[: draw.choice([8, None, None])]
        kind = draw.randrange(6)
        if kind == 0:
            chunks.append((b"iCCP", b"x\0" + bytes([draw.choice([0, 0, 3])]) * draw.randrange(2) + packed))
        elif kind == 1:
            chunks.append((b"zTXt", draw.choice([b"k\0", b"comment\0", b"k"]) + draw.choice([b"\0", b"\7"]) + packed))
        elif kind == 2:
            chunks.append((b"iTXt", draw.choice([b"k\0\1\0\0\0" + packed, b"comment\0\0\0\0\0\xff", b"k\0\1"])))
        elif kind == 3:
            chunks.append((b"tEXt", draw.choice([b"comment\0" + b"c" * draw.choice([5, 70_000]), b"k\0v", b""])))
        else:
            chunks.append((draw.choice(names), draw.randbytes(draw.choice([0, 1, 3, 8, 26, 32]))))
    block, orientation = exif_block(draw)
    kind = draw.randrange(5)
    if kind < 2 and block:
        chunks.insert(0, (b"eXIf", block))
    elif kind < 4 and block:
        digits = (b"Exif\0\0" * draw.randrange(2) + block).hex().encode()
        text = b"\nexif\n%8d\n" % len(block) + b"\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
        content = draw.choice([b"\0\0" + zlib.compress(text), b"\0" + text])
        name = b"tEXt" if content[1:2] == b"\n" else b"zTXt"
        chunks.insert(0, (name, b"Raw profile type exif" + content))
    else:
        orientation = 1
    head, tail = clean[:33], clean[33:-12]  # IHDR, and all but IEND
    for name, content in chunks:
        chunk = png_chunk(name, content, draw.choice([None, None, 1]))
        if draw.random() < 0.7:
            head += chunk
        else:
            tail += chunk
    return head + tail + draw.choice([clean[-12:], clean[-12:], b"", b"\0\0\1\0tEXt"]), orientation


def webp_with(draw: random.Random, clean: bytes) -> tuple[bytes, int]:
    block, orientation = exif_block(draw)
    flags = draw.choice([0x08, 0x08, 0x2C, 0x0C])
    body = clean[12:]
    if body[:4] != b"VP8X":
        alpha = 0x10 * (body[:4] == b"VP8L" and bool(body[12] & 0x10))
        body = b"VP8X" + struct.pack("<LB3x", 10, flags | alpha) + b"\x28\0\0\x16\0\0" + body
    else:
        body = body[:8] + bytes([body[8] | flags]) + body[9:]
    if flags & 0x20:
        body = body[:18] + b"ICCP" + struct.pack("<L", 4) + b"abcd" + body[18:]
    if block:
        body += b"EXIF" + struct.pack("<L", len(block)) + block + bytes(len(block) % 2)
    if flags & 0x04:
        body += b"XMP " + struct.pack("<L", draw.choice([4, 4, 400])) + b"<x/>"
    size = len(body) + 4 + draw.choice([0, 0, 0, 8])
    return b"RIFF" + struct.pack("<L", size) + b"WEBP" + body, orientation if block else 1


def tiff_with(draw: random.Random, clean: bytes) -> tuple[bytes, int]:
    """A directory behind the file that has more entries."""
    begin = struct.unpack_from("<L", clean, 4)[0]
    count = struct.unpack_from("<H", clean, begin)[0]
    entries = [clean[begin + 2 + 12 * row :][:12] for row in range(count)]
    entries = [entry for entry in entries if entry[:2] != struct.pack("<H", 0x112)]
    value, kind = draw.choice([*range(1, 9), 0, 9]), draw.choice([3, 3, 3, *KINDS])
    entries.append(struct.pack("<HHL", 0x112, kind, draw.choice([1, 1, 2, 0])) + struct.pack("<L", value))
    for _ in range(draw.randrange(4)):
        tag = draw.choice([0x10E, 0x10F, 0x11A, 0x11B, 0x128, 0x8773, 0x8649, 0x8769, 0x8825, 0x2BC, 0xFE00])
        offset = draw.choice([0, 8, 0xFFFFFFF0])
        entries.append(struct.pack("<HHLL", tag, draw.randrange(15), draw.choice([0, 1, 2, 9, 1 << 31]), offset))
    entries.sort(key=lambda entry: entry[1::-1])
    directory = struct.pack("<H", len(entries)) + b"".join(entries)
    padded = clean + bytes(len(clean) % 2)
    data = padded[:4] + struct.pack("<L", len(padded)) + padded[8:] + directory
    return data + draw.choice([bytes(4), b"", struct.pack("<L", len(padded))]), value if 1 <= value <= 8 else 1


def gif_with(draw: random.Random, clean: bytes) -> tuple[bytes, int]:
    begin = 13 + (3 << (clean[10] & 7) + 1 if clean[10] & 0x80 else 0)
    added = b""
    for _ in range(draw.randrange(4)):
        label = draw.choice([0xFE, 0xFF, 0x01, 0xCE])
        blocks = [
            draw.choice([b"NETSCAPE2.0", draw.randbytes(draw.randrange(1, 20))]) for _ in range(draw.randrange(3))
        ]
        added += bytes([0x21, label]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    if draw.random() < 0.2:
        added += b"\x21\xfe" + (b"\xff" + b"c" * 255) * 300 + b"\0"
    return clean[:begin] + added + clean[begin:], 1


FORMS: dict[str, Callable[[random.Random, bytes], tuple[bytes, int]]] = {
    "JPEG": jpeg_with,
    "PNG": png_with,
    "WEBP": webp_with,
    "TIFF": tiff_with,
    "GIF": gif_with,
}
MODES_OF = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "L", "P", "RGBA", "LA", "1"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["RGB", "L", "CMYK", "RGBA"],
    "GIF": ["P", "L"],
}


def made(draw: random.Random) -> Input:
    """An image with random metadata; one in eight has damaged pixel data."""
    form = draw.choice(["JPEG", "JPEG", "PNG", "PNG", "WEBP", "TIFF", "GIF"])
    clean = image_file(form, draw.choice(MODES_OF[form]), draw.randrange(8))
    data, orientation = FORMS[form](draw, clean)
    whole = draw.random() >= 0.125
    if not whole:
        data = damaged(draw, form, data)
    return Input(form, data, clean, orientation, whole)


def damaged(draw: random.Random, form: str, data: bytes) -> bytes:
    """Cut anywhere; of a PNG also with a wrong checksum of a chunk that decides pixels."""
    at = data.find(draw.choice([b"IHDR", b"IDAT", b"PLTE"])) if form == "PNG" and draw.random() < 0.5 else -1
    if at > 0:
        end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
        return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]
    return data[: draw.randrange(1, len(data))]


# -- the check


def decoded(data: bytes, width: int, height: int) -> np.ndarray:
    """A JPEG of a beton by the loader's decoder, which reads no metadata: uint8 [H, W, 3]."""
    library, handle = DECOMPRESSOR.library, ctypes.c_void_p(DECOMPRESSOR.handle)
    image = np.empty((height, width, 3), np.uint8)
    source, target = ctypes.c_char_p(data), ctypes.c_void_p(image.ctypes.data)
    size = ctypes.c_ulong(len(data))
    failed = library.tjDecompress2(handle, source, size, target, width, 3 * width, height, RGB, 0)
    assert not failed or library.tjGetErrorCode(handle) == 0, library.tjGetErrorStr2(handle)  # 0: a warning
    return image


def read_truncated(data: bytes) -> bool:
    """Whether the independent reader decodes the image."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            image.load()
        return True
    except Exception:  # Pillow's plugins raise many types
        return False
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@cache
def expected(clean: bytes, orientation: int) -> list[np.ndarray]:
    """Pixels in a beton of a clean file with this orientation: converted, or also as they are if it is a plain JPEG."""
    with Image.open(io.BytesIO(clean)) as image:
        flat = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if flat.mode == "RGBA":
        flat = Image.alpha_composite(Image.new("RGBA", flat.size, "white"), flat).convert("RGB")
    turn = TURNS[orientation]
    flat = flat if turn is None else flat.transpose(turn)
    jpeg = encode(flat, quality=SETTINGS.jpeg_quality, subsampling=SETTINGS.jpeg_subsampling)
    plain = [clean] if image.format == "JPEG" and image.mode == "RGB" and turn is None else []
    return [decoded(data, *flat.size) for data in [jpeg, *plain]]


def check(image: Input) -> Counter[str]:
    """The outcome of one image; AssertionError if it is lost or has other pixels."""
    independent = read_truncated(image.data)
    try:
        jpeg, width, height, damaged_metadata = prepare(image.data, SETTINGS)
    except BadImage as error:
        if image.whole:
            raise
        return Counter({f"{image.form}: {error.reason}": 1})
    found = decoded(jpeg, width, height)
    turns = {image.orientation} if image.whole else {image.orientation, 1}  # the cut may be in the EXIF block
    assert any(np.array_equal(found, pixels) for turn in turns for pixels in expected(image.clean, turn))
    kept = "kept with damaged metadata" if damaged_metadata else "kept"
    return Counter({f"{image.form}: {kept}" + ("" if independent else ", Pillow refuses it"): 1})


def fuzz_images(inputs: int, seed: int, check: Callable[[Input], Counter[str]] = check) -> Counter[str]:
    """Check `inputs` images."""
    return check_all(
        inputs, seed, made, lambda image, _: check(image), lambda image: (f"fuzz-failed.{image.form}", image.data)
    )


if __name__ == "__main__":
    main(__doc__, "no crash, no hang, none lost", lambda chosen, _: fuzz_images(chosen.inputs, chosen.seed))
