"""What goes into a beton: plain JPEGs untouched, anything else converted once or refused with a reason."""

import io
import struct
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_cases import CUT_PNG, EPS, EXIF_TURNED, EXIF_UPRIGHT, EXIF_WRONG, RGB, png_header
from labels import native
from labels.settings import Build, ShorterSide
from labels.storage import UserError
from preprocess.betons.images import BadImage, check_in_place, image_size, jpeg_header, prepare, scan_jpegs
from preprocess.betons.write import ResolvedImages, resolve_images
from preprocess.readers.base import ScratchFile
from preprocess.readers.images import ShardImages
from shard_factory import encode, jpeg, pixels

PLAIN = Build(max_pixels=10**6)
RAMP = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (24, 1))


def prepared(data: bytes) -> tuple[bytes, np.ndarray]:
    """The bytes for the beton, and their pixels; checks that they are a plain JPEG of the returned size."""
    found, width, height, _ = prepare(data, PLAIN)
    header = jpeg_header(found)
    assert header is not None and header.plain and (header.width, header.height) == (width, height)
    with Image.open(io.BytesIO(found)) as image:
        assert image.mode == "RGB" and image.size == (width, height)
        return found, np.asarray(image).astype(int)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        encode(RGB, quality=30, progressive=True),
        encode(RGB, subsampling="4:4:4", comment=b"hello"),
        encode(RGB, exif=EXIF_UPRIGHT),
        encode(RGB, exif=EXIF_WRONG),
        encode(RGB, icc_profile=b"x" * 70_000),
        jpeg() + b"\0" * 7,
        jpeg() + b"trailing junk, as cameras write it",
    ],
    ids=[
        "baseline",
        "progressive",
        "4:4:4",
        "upright",
        "nonsense orientation",
        "long header",
        "zeros after",
        "junk after",
    ],
)
def test_a_plain_rgb_jpeg_is_left_as_it_is(data: bytes) -> None:
    assert prepared(data)[0] == data


def test_cmyk_jpeg_becomes_rgb() -> None:
    red = Image.new("CMYK", (40, 24), (0, 255, 255, 0))
    found = prepared(encode(red))[1]
    assert abs(found - [255, 0, 0]).max() <= 3


def test_grey_jpeg_becomes_rgb() -> None:
    found = prepared(encode(Image.fromarray(RAMP)))[1]
    assert abs(found - RAMP[:, :, None]).max() <= 6


@pytest.mark.parametrize(("form", "extra"), [("PNG", {}), ("TIFF", {})])
def test_16_bit_grey_keeps_its_ramp(form: str, extra: dict[str, str]) -> None:
    found = prepared(encode(Image.fromarray(RAMP.astype(np.uint16) * 257), form, **extra))[1]
    assert abs(found - RAMP[:, :, None]).max() <= 6


def test_palette_png() -> None:
    palette = Image.new("P", (40, 24), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert abs(prepared(encode(palette, "PNG"))[1] - [10, 200, 30]).max() <= 3


def test_one_bit_png() -> None:
    assert prepared(encode(Image.new("1", (40, 24), 1), "PNG"))[1].min() >= 252


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (40, 24), 0)
        image.putpalette([0, 0, 0])
        data = encode(image, "PNG", transparency=0)
    else:
        data = encode(Image.new(mode, (40, 24), 0), "PNG")
    assert prepared(data)[1].min() >= 252


def test_half_transparency_is_blended() -> None:
    assert abs(prepared(encode(Image.new("RGBA", (40, 24), (0, 0, 0, 128)), "PNG"))[1] - 127).max() <= 3


def test_exif_orientation_is_applied() -> None:
    picture = np.zeros((24, 40, 3), np.uint8)
    picture[:, :20] = 255  # white on the left: on top, once turned clockwise
    found = prepared(encode(Image.fromarray(picture), quality=95, exif=EXIF_TURNED))[1]
    assert found.shape == (40, 24, 3)
    assert found[:16].min() > 240 and found[24:].max() < 15


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_converted(form: str) -> None:
    flat = Image.new("RGB", (40, 24), (200, 100, 50))
    assert abs(prepared(encode(flat, form))[1] - [200, 100, 50]).max() <= 4


def test_converting_is_the_same_every_time() -> None:
    data = encode(RGB, "PNG")
    assert prepare(data, PLAIN) == prepare(data, PLAIN)
    assert prepare(data, Build(jpeg_quality=30))[0] != prepare(data, PLAIN)[0]


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "not an image", "none of JPEG, PNG"),
        (b"<html>404 Not Found</html>", "not an image", "none of JPEG, PNG"),
        (b"\xff\xd8\xff", "image cut or damaged", "none of JPEG, PNG"),
        (jpeg()[:300], "image cut or damaged", ""),
        (jpeg(width=200, height=200)[:-5000], "image cut or damaged", "truncated"),
        (encode(RGB, icc_profile=b"x" * 40_000)[:20_000], "image cut or damaged", ""),
        (CUT_PNG, "image cut or damaged", ""),
        (EPS, "not an image", "none of JPEG, PNG"),
        (jpeg(width=1001, height=1000), "too many pixels", "1001 x 1000; allowed: 1000000 pixels, 65500 a side"),
        (png_header(30_000, 30_000), "too many pixels", "30000 x 30000; allowed: 1000000 pixels"),
        (png_header(65_501, 1), "too many pixels", "65501 x 1"),
        (png_header(2**31 - 1, 2**31 - 1), "too many pixels", "2147483647 x 2147483647"),
        (png_header(100, 100), "image cut or damaged", ""),
        (png_header(0, 5), "not an image", ""),
    ],
)
def test_a_bad_image_has_a_reason(data: bytes, reason: str, detail: str) -> None:
    with pytest.raises(BadImage) as caught:
        prepare(data, PLAIN)
    assert caught.value.reason == reason and detail in str(caught.value)


def test_a_jpeg_header_of_too_many_pixels_is_refused_unread() -> None:
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadImage, match="60000 x 60000"):
        prepare(bytes(data), Build())


def test_the_limit_of_pixels_is_the_settings_and_not_pils() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage) as caught:
        prepare(png_header(20_000, 20_000), Build(max_pixels=400_000_000 - 1))
    assert caught.value.reason == "too many pixels"
    assert before == Image.MAX_IMAGE_PIXELS
    assert image_size(png_header(20_000, 20_000)) == (20_000, 20_000)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (jpeg(width=31, height=17), (31, 17)),
        (jpeg(width=31, height=17)[:700], (31, 17)),
        (encode(RGB, "PNG")[:100], (40, 24)),
        (encode(RGB, "WEBP"), (40, 24)),
        (b"no image", None),
        (b"\xff\xd8\xff\xe0\x00", None),
        (b"", None),
    ],
)
def test_size_from_the_first_bytes(data: bytes, size: tuple[int, int] | None) -> None:
    assert image_size(data) == size


def test_arithmetic_coding_is_not_plain() -> None:
    data = bytearray(jpeg())
    data[data.index(b"\xff\xc0") + 1] = 0xC9
    header = jpeg_header(bytes(data))
    assert header is not None and not header.plain


def test_a_larger_image_is_shrunk_to_its_shorter_side_and_a_smaller_one_left_alone() -> None:
    settings = Build(images=ShorterSide(shorter_side=64), jpeg_quality=90)
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 400, dtype=np.uint8), (200, 1))).convert("RGB")
    for data, size in (
        (encode(ramp), (128, 64)),
        (encode(ramp, "PNG"), (128, 64)),
        (encode(ramp, exif=EXIF_TURNED), (64, 128)),
        (encode(ramp.resize((130, 65))), (128, 64)),
    ):
        found, width, height, _ = prepare(data, settings)
        assert (width, height) == size
        with Image.open(io.BytesIO(found)) as image:
            assert image.size == size
            expected = ramp.resize((128, 64), Image.Resampling.BICUBIC)
            upright = image.transpose(Image.Transpose.ROTATE_90) if size[0] < size[1] else image
            assert np.abs(np.asarray(upright).astype(int) - np.asarray(expected)).max() <= 4
    small = jpeg(1, 64, 100)
    assert prepare(small, settings) == (small, 64, 100, False)


@pytest.mark.parametrize(("subsampling", "sampling"), [("4:4:4", 0x11), ("4:2:2", 0x21), ("4:2:0", 0x22)])
def test_subsampling_of_converted_images(subsampling: Literal["4:4:4", "4:2:2", "4:2:0"], sampling: int) -> None:
    found = prepare(encode(RGB, "PNG"), Build(jpeg_subsampling=subsampling))[0]
    header = jpeg_header(found)
    assert header is not None and found[header.frame_offset + 11] == sampling


def test_without_a_check_a_cut_jpeg_goes_in_as_it_is() -> None:
    cut = jpeg(width=200, height=200)[:-5000]
    assert prepare(cut, Build(decode_check="none"))[0] == cut
    with pytest.raises(BadImage, match="truncated"):
        prepare(cut, Build(decode_check="header"))


EXAMPLES = [
    jpeg(),
    jpeg()[:-1],
    jpeg()[:300],
    encode(RGB, progressive=True),
    encode(RGB.convert("L")),
    encode(RGB.convert("CMYK")),
    encode(RGB, exif=EXIF_TURNED),
    encode(RGB, exif=EXIF_UPRIGHT),
    encode(RGB, "PNG"),
    b"",
    b"\xff\xd8\xff",
    jpeg(2, 900, 1200),
]


@given(
    number=st.integers(0, len(EXAMPLES) - 1),
    changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=3),
    shorter=st.sampled_from([None, 30]),
    check=st.sampled_from(["none", "header"]),
)
@settings(max_examples=300, deadline=None)
def test_the_scan_takes_only_what_stays_unchanged(
    number: int, changes: list[tuple[int, int]], shorter: int | None, check: Literal["none", "header"]
) -> None:
    """On whole and on damaged headers; of those with EXIF the scan decides nothing."""
    data = bytearray(EXAMPLES[number])
    for at, byte in changes:
        if at < len(data):
            data[at] = byte
    image = bytes(data)
    wanted = Build(
        max_pixels=10**6, images=ShorterSide(shorter_side=shorter) if shorter else "original", decode_check=check
    )
    padded = np.frombuffer(b"before" + image + b"\xff\xd9 behind", np.uint8)
    scan = scan_jpegs(padded, np.array([[6, 6 + len(image)], [-1, -1]]), wanted)
    assert not scan.plain[1]
    try:
        found, width, height, _ = prepare(image, wanted)
    except BadImage:
        assert not scan.plain[0]
        return
    header = jpeg_header(image)
    assert scan.plain[0] == (found == image and header is not None and not header.exif)
    if scan.plain[0]:
        assert (scan.width[0], scan.height[0]) == (width, height)


def resolved(images: list[bytes], **options: Any) -> ResolvedImages:
    data = np.frombuffer(b"".join(images), np.uint8)
    ends = np.cumsum([len(image) for image in images])
    spans = np.stack([ends - [len(image) for image in images], ends], axis=1)
    keys = pa.array([str(number) for number in range(len(images))])
    with ScratchFile(None) as scratch:
        return resolve_images(ShardImages(data, spans, {}), keys, Build(**options), scratch)


def test_a_full_check_finds_damage_that_the_header_does_not_show() -> None:
    photo = Image.fromarray(pixels(9, 12, 12)).resize((300, 300), Image.Resampling.BICUBIC)
    whole = encode(photo, quality=90)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff\xd9" * 20  # the end mark comes early
    chatty = whole[:-2] + b"\0\0\0" + whole[-2:]  # bytes too many before a marker hurt nobody
    images = [whole, bytes(damaged), chatty, encode(RGB, "PNG"), encode(photo, progressive=True)]
    assert resolved(images).good.all() and resolved(images, decode_check="none").good.all()
    found = resolved(images, decode_check="full")
    assert found.good.tolist() == [True, False, True, True, True] and found.converted.tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert (found.faults[1].reason, found.faults[1].key) == (
        "image cut or damaged",
        "1",
    ) and "premature" in found.faults[1].detail


def test_a_full_check_without_its_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("libturbojpeg is not installed")

    monkeypatch.setattr(native, "load_turbojpeg", missing)
    with pytest.raises(UserError, match=r"libturbojpeg is not installed(.|\n)*apt-get install libturbojpeg0"):
        resolved([jpeg()], decode_check="full")


@pytest.mark.parametrize(
    ("data", "description"),
    [
        (encode(RGB, "PNG"), "PNG RGB, 40 x 24, orientation 1"),
        (encode(RGB.convert("L")), "JPEG L, 40 x 24"),
        (encode(RGB, exif=EXIF_TURNED), "JPEG RGB, 40 x 24, orientation 6"),
    ],
)
def test_an_image_that_cannot_be_read_in_place_is_described(data: bytes, description: str) -> None:
    assert check_in_place(jpeg(), Build()) == (jpeg(), 32, 32, False)
    with pytest.raises(BadImage) as caught:
        check_in_place(data, Build())
    assert (
        caught.value.reason == "not a plain JPEG"
        and description in str(caught.value)
        and "--no-images" in str(caught.value)
    )
