"""What decides no pixel costs no image: EXIF, PNG chunks, JPEG segments and the like, damaged in many ways."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuzz_images import fuzz_images, png_chunk
from image_cases import EXIF_TURNED
from labels.image_metadata import read_orientation
from labels.settings import Build
from labels.show.explanation import thumbnail
from preprocess.betons.images import BadImage, check_in_place, image_size, prepare
from shard_factory import encode, healthy, jpeg, preprocess, quarantined, sample, write_tar

# White on the left: on top, once turned clockwise (orientation 6).
HALF = Image.fromarray(np.repeat(np.repeat([[255, 0]], 24, 0), 20, 1).astype(np.uint8)).convert("RGB")


def upright_half(data: bytes) -> bool:
    """Whether the image gets into a beton whole and turned clockwise."""
    with Image.open(io.BytesIO(prepare(data, Build()).jpeg)) as image:
        found = np.asarray(image)
    return found.shape == (40, 24, 3) and found[:16].min() > 240 and found[24:].max() < 15


def exif(order: str, *entries: bytes, count: int | None = None, first: int = 8) -> bytes:
    """An EXIF block of these entries."""
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, first) + bytes(first - 8)
    return head + struct.pack(order + "H", len(entries) if count is None else count) + b"".join(entries) + bytes(4)


def entry(order: str, tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack(order + "HHL", tag, kind, count) + value.ljust(4, b"\0")


def turned(order: str, kind: int = 3, count: int = 1, code: str = "H") -> bytes:
    """The entry of orientation 6."""
    return entry(order, 0x112, kind, count, struct.pack(order + code, 6))


LE, BE = "<", ">"
OFFSET = struct.pack("<L", 0xFFFFFFF0)
BLOCKS = {
    "signed rational": exif(LE, turned(LE), entry(LE, 0x11A, 10, 1, struct.pack("<L", 38))) + struct.pack("<ii", -5, 1),
    "big endian": exif(BE, turned(BE), entry(BE, 0x11A, 10, 1, struct.pack(">L", 38))) + struct.pack(">ii", -5, 1),
    "rational of a type that cannot be written": exif(LE, turned(LE), entry(LE, 0x10F, 11, 1, b"\0\0\xc0\x7f")),
    "text of a type for numbers": exif(LE, turned(LE), entry(LE, 0x10F, 3, 2, b"\1\0\2\0")),
    "number where text belongs": exif(LE, turned(LE), entry(LE, 0x131, 10, 1, struct.pack("<L", 8))),
    "value far behind the block": exif(LE, entry(LE, 0x10F, 2, 99, OFFSET), turned(LE)),
    "huge count": exif(LE, entry(LE, 0x10F, 4, 0xFFFFFFFF, OFFSET), turned(LE)),
    "count of 0": exif(LE, turned(LE, count=0)),
    "count of 2": exif(LE, turned(LE, count=2)),
    "LONG": exif(BE, turned(BE, kind=4, code="L")),
    "BYTE": exif(LE, turned(LE, kind=1, code="B")),
    "unknown type": exif(LE, turned(LE, kind=99)),
    "more entries claimed than there are": exif(LE, turned(LE), count=500),
    "directory that names itself as the next": exif(LE, turned(LE))[:-4] + struct.pack("<L", 8),
    "sub-directory that is the directory": exif(LE, turned(LE), entry(LE, 0x8769, 4, 1, struct.pack("<L", 8))),
    "sub-directory behind the block": exif(LE, turned(LE), entry(LE, 0x8769, 4, 1, OFFSET)),
    "sub-directory of the wrong type": exif(LE, turned(LE), entry(LE, 0x8825, 2, 4, b"abcd")),
    "no pointer to the next": exif(LE, turned(LE))[:-4],
    "odd offset of the directory": exif(LE, turned(LE), first=13),
    "another number than 42": exif(LE, turned(LE))[:2] + b"\x2b\x01" + exif(LE, turned(LE))[4:],
}


def in_jpeg(block: bytes) -> bytes:
    plain = encode(HALF, quality=95)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + plain[2:]


def in_png(block: bytes) -> bytes:
    png = encode(HALF, "PNG")
    return png[:33] + png_chunk(b"eXIf", block) + png[33:]


def in_png_text(block: bytes) -> bytes:
    text = b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\nz"  # a digit that is none
    png = encode(HALF, "PNG")
    return png[:33] + png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)) + png[33:]


def in_webp(block: bytes) -> bytes:
    return encode(HALF, "WEBP", exif=block, lossless=True)


@pytest.mark.parametrize("container", [in_jpeg, in_png, in_png_text, in_webp])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_an_image_with_malformed_exif_is_kept_and_turned(container, block: bytes) -> None:
    assert upright_half(container(block))


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_upright(value: int) -> None:
    block = exif(LE, entry(LE, 0x112, 3, 1, struct.pack("<H", value)))
    assert read_orientation(in_jpeg(block)) == (1, False) and prepare(in_jpeg(block), Build()).jpeg == in_jpeg(block)


@pytest.mark.parametrize(
    "kind", ["LONG", "BYTE", "count of 2", "count of 0", "huge count", "value far behind the block"]
)
def test_a_tiff_with_malformed_tags_is_kept_and_turned(kind: str) -> None:
    block, tiff = BLOCKS[kind], encode(HALF, "TIFF")
    order = LE if block.startswith(b"II") else BE
    begin = struct.unpack_from("<L", tiff, 4)[0]
    rows = tiff[begin + 2 :][: 12 * struct.unpack_from("<H", tiff, begin)[0]]
    added = struct.iter_unpack(order + "HHL4s", block[10:][: 12 * struct.unpack_from(order + "H", block, 8)[0]])
    values = {"LONG": struct.pack("<L", 6)}
    rows += b"".join(struct.pack("<HHL4s", *row[:3], values.get(kind, row[3])) for row in added)
    directory = struct.pack("<H", len(rows) // 12) + rows + bytes(4)
    assert upright_half(tiff[:4] + struct.pack("<L", len(tiff)) + tiff[8:] + directory)


def test_several_pictures_in_one_jpeg_with_a_malformed_index() -> None:
    data = bytearray(encode(HALF, "MPO", save_all=True, append_images=[HALF], exif=EXIF_TURNED, quality=95))
    at = data.index(b"MPF\0") + 4
    data[at + 8 : at + 40] = bytes(range(32))
    assert upright_half(bytes(data))


# -- what decides no pixel

LARGE = zlib.compress(b"p" * 2_000_000)
PNG_CHUNKS = {
    "2 MB of colour profile": (b"iCCP", b"x\0\0" + LARGE),
    "colour profile of an unknown coding": (b"iCCP", b"x\0\7abc"),
    "colour profile without a coding": (b"iCCP", b"x\0"),
    "2 MB of packed text": (b"zTXt", b"k\0\0" + LARGE),
    "packed text of an unknown coding": (b"zTXt", b"k\0\7abc"),
    "2 MB of international text": (b"iTXt", b"k\0\1\0\0\0" + LARGE),
    "70 KB of comment": (b"tEXt", b"comment\0" + b"c" * 70_000),
    "exif that is no hexadecimal number": (b"tEXt", b"Raw profile type exif\0\n\nexif\n  4\nxyz!"),
    **{
        f"short {name.decode()}": (name, b"\0")
        for name in (b"pHYs", b"gAMA", b"cHRM", b"bKGD", b"acTL", b"fcTL", b"sBIT")
    },
    "empty sRGB": (b"sRGB", b""),
    "animation of 0 pictures": (b"acTL", bytes(8)),
    "animation out of order": (b"fcTL", struct.pack(">5L", 7, 40, 24, 0, 0) + bytes(6)),
    "larger picture of an animation": (b"fcTL", struct.pack(">5L", 0, 400, 24, 0, 0) + bytes(6)),
    "short fdAT": (b"fdAT", b""),
}


def same_pixels(data: bytes, clean: bytes) -> bool:
    return prepare(data, Build()).jpeg == prepare(clean, Build()).jpeg


@pytest.mark.parametrize("checksum", [None, 1], ids=["", "wrong checksum"])
@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("chunk", PNG_CHUNKS.values(), ids=PNG_CHUNKS)
def test_a_png_chunk_that_decides_no_pixel_costs_no_image(
    chunk: tuple[bytes, bytes], behind: bool, checksum: int | None
) -> None:
    clean = encode(HALF, "PNG")
    at = len(clean) - 12 if behind else 33
    assert same_pixels(clean[:at] + png_chunk(*chunk, checksum) + clean[at:], clean)


@pytest.mark.parametrize("name", [b"tEXt", b"abCd", b"iCCP", b"eXIf"])
def test_a_png_cut_behind_its_pixels_is_kept(name: bytes) -> None:
    clean = encode(HALF, "PNG")
    assert same_pixels(clean[:-12] + png_chunk(name, b"k\0" + b"v" * 99)[:40], clean)
    assert same_pixels(clean[:-12], clean) and same_pixels(clean[:-4], clean)


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_a_png_with_a_wrong_checksum_of_its_pixels_is_rejected(name: bytes) -> None:
    png = encode(HALF.quantize(4), "PNG", transparency=b"\0\1\2\3")
    at = png.index(name)
    end = at + 4 + int.from_bytes(png[at - 4 : at], "big")
    with pytest.raises(BadImage, match=f"wrong checksum in the PNG chunk {name.decode()}"):
        prepare(png[:end] + bytes([png[end] ^ 1]) + png[end + 1 :], Build())


@pytest.mark.parametrize("where", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_damaged_metadata_let_no_cut_image_through(form: str, where: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    clean = encode(noise, form)
    data = clean[: int(len(clean) * where)]
    data = data[:33] + png_chunk(b"tEXt", b"k\0v", 1) + data[33:] if form == "PNG" else data
    data = data[:2] + b"\xff\xee\0\x09Adobe\0\0" + data[2:] if form == "JPEG" else data
    with pytest.raises(BadImage):
        prepare(data, Build())


def test_metadata_are_unpacked_within_bounds() -> None:
    bomb = zlib.compress(b"0" * 50_000_000)
    clean = encode(HALF, "PNG")
    data = clean[:33] + png_chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb) + clean[33:]
    assert same_pixels(data, clean)


SEGMENTS = {
    "short Adobe": b"\xff\xee\0\x09Adobe\0\0",
    "short JFIF": b"\xff\xe0\0\x08JFIF\0\0",
    "length 0": b"\xff\xe5\0\0",
    "length 1": b"\xff\xfe\0\1",
    "Photoshop block that ends early": b"\xff\xed\0\x16Photoshop 3.0\x008BIM\4\0",
    "profile parts out of order": b"\xff\xe2\0\x11ICC_PROFILE\0\2\3a" + b"\xff\xe2\0\x11ICC_PROFILE\0\1\3b",
    "profile part without a number": b"\xff\xe2\0\x0eICC_PROFILE\0",
    "index of pictures that is none": b"\xff\xe2\0\x0eMPF\0II*\0\xff\xff\xff\xff",
    "marker without a length": b"\xff\x01",
    "fill bytes": b"\xff\xff\xff\xff\xfe\0\3c",
    "longer than its length": b"\xff\xe9\0\5abcdefgh",
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
def test_a_jpeg_segment_that_decides_no_pixel_costs_no_image(segment: bytes, mode: str) -> None:
    clean = encode(HALF.convert(mode), quality=95)
    with Image.open(io.BytesIO(clean)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    prepared = prepare(clean[:2] + segment + clean[2:], Build())
    data = clean if prepared.jpeg == clean[:2] + segment + clean[2:] else prepared.jpeg
    with Image.open(io.BytesIO(data)) as image:
        assert abs(np.asarray(image) - expected).max() <= 8


def test_side_chunks_of_webp_and_extensions_of_gif() -> None:
    webp = encode(HALF, "WEBP", lossless=True, exif=b"Exif\0\0" + BLOCKS["huge count"], icc_profile=b"p" * 9)
    assert upright_half(webp) and upright_half(webp[:-3])  # in the EXIF chunk, whose entries are still there
    gif = encode(HALF, "GIF")
    begin = 13 + (3 << (gif[10] & 7) + 1)
    for extension in (
        b"\x21\xff\0",
        b"\x21\xce\3abc\0",
        b"\x21\xff\x0bNETSCAPE2.0\0",
        b"\x21\xfe" + b"\xff" * 70_400 + b"\0",
    ):
        assert same_pixels(gif[:begin] + extension + gif[begin:], gif)


def test_sizes_and_thumbnails_of_images_with_damaged_metadata() -> None:
    for data in (in_png(b"II"), in_jpeg(b"MM"), in_jpeg(BLOCKS["huge count"])):
        assert image_size(data) == (40, 24) and thumbnail(data, 16) is not None
    clean = jpeg()
    odd = clean[:2] + SEGMENTS["short Adobe"] + clean[2:]
    assert prepare(odd, Build()).jpeg == odd and thumbnail(odd, 16) == thumbnail(clean, 16)


def test_an_image_in_place_is_described_whatever_its_metadata() -> None:
    with pytest.raises(BadImage, match="JPEG RGB, 40 x 24, orientation 6"):
        check_in_place(in_jpeg(BLOCKS["huge count"]), Build())
    assert check_in_place(in_jpeg(b"nonsense"), Build()).damaged_metadata


@pytest.mark.parametrize("option", [(), ("--no-images",)])
def test_a_build_counts_damaged_metadata(tmp_path: Path, option: tuple[str, ...]) -> None:
    odd = [in_jpeg(b"II*\0\xff"), in_jpeg(exif(LE, entry(LE, 0x10F, 2, 99, OFFSET)))]
    odd += [] if option else [in_png(BLOCKS["huge count"])]
    members = [member for number, image in enumerate(odd) for member in sample(f"odd{number}", "a cat", image)]
    write_tar(tmp_path / "data" / "0.tar", [*healthy(5), *members])
    for _ in range(2):  # the second has nothing to do
        said = preprocess("build-labels", tmp_path / "data", "--out", tmp_path / "out", "--workers", 1, *option)
        assert said.code == 0 and f"images kept with damaged metadata: {len(odd)}\n" in said.out
    assert quarantined(tmp_path / "out") == []
    write_tar(tmp_path / "good" / "0.tar", healthy(5))
    said = preprocess("build-labels", tmp_path / "good", "--out", tmp_path / "o", "--workers", 1, *option)
    assert said.code == 0 and "kept with" not in said.out


def test_pillow_prints_no_warning(tmp_path: Path) -> None:
    tiff = encode(HALF, "TIFF", tiffinfo={270: "a text"})
    at = tiff.index(struct.pack("<HH", 270, 2)) + 4
    images = [
        in_jpeg(BLOCKS["more entries claimed than there are"]),
        in_jpeg(BLOCKS["huge count"]),
        in_png(BLOCKS["no pointer to the next"]),
        tiff[:at] + struct.pack("<L", 1 << 30) + tiff[at + 4 :],
        encode(HALF, "PNG")[:33] + 2 * png_chunk(*PNG_CHUNKS["animation of 0 pictures"]) + encode(HALF, "PNG")[33:],
    ]
    for number, image in enumerate(images):
        (tmp_path / str(number)).write_bytes(image)
    script = "import sys, pathlib; from labels.settings import Build; from preprocess.betons.images import prepare\n"
    script += "for path in sys.argv[1:]: print(prepare(pathlib.Path(path).read_bytes(), Build()).width)"
    command = [sys.executable, "-c", script, *(str(tmp_path / str(number)) for number in range(len(images)))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["40" if number > 2 else "24" for number in range(len(images))] and run.stderr == ""


@pytest.mark.filterwarnings("ignore:::PIL")
def test_a_short_fuzz_run_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    total = fuzz_images(400, 20_261_130)
    kept = sum(count for outcome, count in total.items() if "kept" in outcome)
    assert kept > 300 and total["PNG: kept with damaged metadata, Pillow refuses it"] > 20 and len(total) > 12
