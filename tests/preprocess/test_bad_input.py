"""Every bad input is an error or a row in the quarantine that names the thing; healthy neighbours stay."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from image_cases import CUT_PNG, EPS, EXIF_TURNED, png_header
from labels.manifest import read_manifest
from labels.storage import UserError
from shard_factory import (
    Built,
    Member,
    build,
    encode,
    healthy,
    jpeg,
    preprocess,
    quarantined,
    refused,
    rows,
    sample,
    tar_bytes,
    write_shards,
    write_tar,
)

LENIENT = ("--set", "build.max_bad_fraction=0.9")
DEEP_JSON = b"[" * 100_000
GREY_16 = encode(Image.new("I;16", (8, 8), 40_000), "PNG")

# Members of one bad sample, stage, reason, a part of the detail.
BAD: dict[str, tuple[list[Member], str, str, str]] = {
    "no caption": (sample("bad", None), "labels", "no caption", "looked for: txt, json:caption"),
    "caption of another type": (sample("bad", None, caption=7), "labels", "no caption", "looked for: txt"),
    "no image": ([("bad.txt", b"words"), ("bad.json", b"{}")], "labels", "no image", "members: txt, json"),
    "invalid UTF-8": (sample("bad", b"caf\xe9 \xff"), "labels", "caption is not UTF-8", "position 3"),
    "lone surrogate": (
        sample("bad", None, caption="\ud800"),
        "labels",
        "caption is not UTF-8",
        "surrogates not allowed",
    ),
    "empty caption": (sample("bad", " \n\t"), "labels", "empty caption", "3 bytes of white space"),
    "broken json": ([*sample("bad"), ("bad.json", b'{"uid": ')], "labels", "json is damaged", "line 1 column"),
    "json that is no object": ([*sample("bad"), ("bad.json", b"[1]")], "labels", "json is damaged", "it holds a list"),
    "json too deep": ([*sample("bad"), ("bad.json", DEEP_JSON)], "labels", "json is damaged", "recursion"),
    "uid with a lone surrogate": (sample("bad", uid="\udfff"), "labels", "json is damaged", "surrogates not allowed"),
    "text named jpg": (sample("bad", "a cat", b"404 Not Found"), "images", "not an image", "none of JPEG, PNG"),
    "no bytes named jpg": (sample("bad", "a cat", b""), "images", "not an image", "none of JPEG, PNG"),
    "EPS named jpg": (sample("bad", "a cat", EPS), "images", "not an image", "none of JPEG, PNG"),
    "truncated JPEG": (sample("bad", "a cat", jpeg(1, 90, 90)[:-3000]), "images", "image cut or damaged", "truncated"),
    "truncated PNG": (sample("bad", "a cat", CUT_PNG), "images", "image cut or damaged", "truncated"),
    "bomb": (
        sample("bad", "a cat", png_header(60_000, 60_000)),
        "images",
        "too many pixels",
        "60000 x 60000; allowed: 100000000",
    ),
    "bomb beyond int32": (
        sample("bad", "a cat", png_header(2**32 - 1, 9)),
        "images",
        "too many pixels",
        "4294967295 x 9",
    ),
    "too wide": (sample("bad", "a cat", png_header(65_510, 1)), "images", "too many pixels", "65500 a side"),
}
GOOD: dict[str, bytes] = {
    "CMYK": encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0))),
    "16-bit grey": GREY_16,
    "palette": encode(Image.new("P", (8, 8), 3), "PNG"),
    "alpha": encode(Image.new("RGBA", (8, 8), (1, 2, 3, 4)), "PNG"),
    "grey JPEG": encode(Image.new("L", (8, 8), 9)),
    "turned by EXIF": encode(Image.new("RGB", (8, 16)), exif=EXIF_TURNED),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_quarantined_and_its_neighbours_stay(tmp_path: Path, case: str) -> None:
    members, stage, reason, detail = BAD[case]
    write_tar(tmp_path / "data" / "00000000.tar", [*healthy(2), *members, *healthy(2, 5)])
    write_tar(tmp_path / "data" / "00000001.tar", healthy(1, 9))
    build(tmp_path / "data", tmp_path / "out", *LENIENT)
    assert quarantined(tmp_path / "out") == [("00000000", "bad", stage, reason)]
    assert detail in pq.read_table(tmp_path / "out" / "quarantine.parquet")["detail"][0].as_py()
    keys = [row["key"] for row in rows(tmp_path / "out") if row["key"] != "bad"]
    assert keys == [f"{number:09d}" for number in (0, 1, 5, 6, 9)]
    assert read_manifest(tmp_path / "out").samples == 5
    assert preprocess("verify", tmp_path / "out").code == 0


# Captions that are not empty, but of which cleaning or the tokenizer leaves no label.
UNLABELLED = {
    "byte order mark": ("\ufeff", ()),
    "zero bytes": ("\0\0", ()),
    "control characters": ("\x01\x02\x7f", ()),
    "an entity": ("&nbsp;", ()),
    "stop words": ("the of", ("--set", "labels.stop_words=remove")),
}


@pytest.mark.parametrize("case", UNLABELLED)
@pytest.mark.parametrize("kind", ["tar", "csv"])
def test_a_caption_without_labels_is_counted_in_the_summary(tmp_path: Path, case: str, kind: str) -> None:
    text, options = UNLABELLED[case]
    captions = ["a red cat", text, "a dog", text, " \t"]
    if kind == "tar":
        members = [member for row, caption in enumerate(captions) for member in sample(f"k{row}", caption, jpeg(row))]
        data = write_tar(tmp_path / "data" / "0.tar", members)
    else:
        data = tmp_path / "t.csv"
        lines = [f'k{row},"{caption}"' for row, caption in enumerate(captions)]
        data.write_bytes("\n".join(['"key","caption"', *lines]).encode())
    said = preprocess("build-labels", data, "--out", tmp_path / "out", "--no-beton", "--workers", 1, *options, *LENIENT)
    assert said.code == 0, said.err
    assert "4 label rows" in said.out and "without labels: 2 captions" in said.out
    assert "quarantined: 1 (1 x empty caption)" in said.out, "white space alone is rejected"
    assert read_manifest(tmp_path / "out").unlabelled == 2
    out, query = said.out.partition("list them: preprocess sql ")[2].splitlines()[0].split(" ", 1)
    assert preprocess("sql", out, query.strip('"'), "--format", "csv").out.split() == ["key", "k1", "k3"]


@pytest.mark.parametrize("case", GOOD)
def test_an_unusual_image_is_converted_and_kept(tmp_path: Path, case: str) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*healthy(1), *sample("odd", "a cat", GOOD[case]), *healthy(1, 5)])
    build(tmp_path / "data", tmp_path / "out")
    assert quarantined(tmp_path / "out") == [] and read_manifest(tmp_path / "out").samples == 3


@pytest.mark.parametrize("between", [[], healthy(1, 7)], ids=["adjacent", "apart"])
def test_a_repeated_key_is_used_once(tmp_path: Path, between: list[Member]) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*healthy(1), *between, *healthy(1), *healthy(1, 3)])
    build(tmp_path / "data", tmp_path / "out", *LENIENT)
    assert quarantined(tmp_path / "out") == [("0", "000000000", "labels", "repeated key")]
    assert [row["key"] for row in rows(tmp_path / "out")].count("000000000") == 1
    assert read_manifest(tmp_path / "out").samples == len(rows(tmp_path / "out")) == 2 + bool(between)


def test_a_repeated_key_whose_first_one_is_bad_gives_no_row(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*sample("a", None), *healthy(1), *sample("a", "now with a caption")])
    build(tmp_path / "data", tmp_path / "out", *LENIENT)
    assert quarantined(tmp_path / "out") == [("0", "a", "labels", "no caption"), ("0", "a", "labels", "repeated key")]
    assert read_manifest(tmp_path / "out").samples == 1


@pytest.mark.parametrize(
    ("spoil", "reason", "kept"),
    [
        (lambda data: data[: len(data) // 2], "tar cut or damaged", True),
        (lambda data: data.rstrip(b"\0"), "tar cut or damaged", True),
        (lambda data: b"<html>404</html>" * 100, "not a tar", False),
        (lambda data: b"", "not a tar", False),
        (lambda data: data[:100], "not a tar", False),
    ],
    ids=["cut", "no end mark", "html", "no bytes", "cut in the first header"],
)
def test_a_cut_tar_keeps_earlier_samples_and_the_other_shards(
    tmp_path: Path, spoil: Callable[[bytes], bytes], reason: str, kept: bool
) -> None:
    write_shards(tmp_path / "data", 3, 6)
    (tmp_path / "data" / "00000001.tar").write_bytes(spoil(tar_bytes(healthy(6, 6))))
    build(tmp_path / "data", tmp_path / "out", *LENIENT)
    assert [(shard, stage, why) for shard, _, stage, why in quarantined(tmp_path / "out")] == [
        ("00000001", "labels", reason)
    ]
    counts = [shard.rows for shard in read_manifest(tmp_path / "out").shards]
    assert counts[0] == counts[2] == 6 and (0 < counts[1] < 6 if kept else counts[1] == 0)
    assert read_manifest(tmp_path / "out").betons[0].shards == ["00000000", *(["00000001"] if kept else []), "00000002"]
    assert preprocess("verify", tmp_path / "out").code == 0


def test_too_many_bad_samples_end_the_run_and_the_reasons_stay(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*healthy(8), *sample("x", None), *sample("y", b"\xff")])
    found = refused(tmp_path / "data", tmp_path / "out")
    assert "2 of 10 samples are bad (20.0%): 1 x caption is not UTF-8, 1 x no caption" in found
    assert "build.max_bad_fraction = 10.0%" in found and "--set build.max_bad_fraction=" in found
    assert len(quarantined(tmp_path / "out")) == 2 and not (tmp_path / "out" / "manifest.json").exists()
    build(tmp_path / "data", tmp_path / "out", "--set", "build.max_bad_fraction=0.2")


def test_bad_images_count_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*healthy(8), *sample("x", None), *sample("y", "words", b"junk")])
    found = refused(tmp_path / "data", tmp_path / "out", "--set", "build.max_bad_fraction=0.1")
    assert "2 of 10 samples are bad (20.0%): 1 x no caption, 1 x not an image" in found
    build(tmp_path / "data", tmp_path / "out", "--no-beton", "--set", "build.max_bad_fraction=0.1")


@pytest.mark.parametrize("image", [jpeg(), b"junk"])
@pytest.mark.parametrize("caption", ["words", None])
def test_an_empty_result_is_an_error(tmp_path: Path, caption: str | None, image: bytes) -> None:
    write_tar(tmp_path / "data" / "0.tar", sample("0", caption, image))
    if caption and image != b"junk":
        build(tmp_path / "data", tmp_path / "out")
        return
    found = refused(tmp_path / "data", tmp_path / "out", "--set", "build.max_bad_fraction=1.0")
    assert "no usable sample: 1 x " + ("not an image" if caption else "no caption") in found
    assert "quarantine.parquet" in found and not (tmp_path / "out" / "manifest.json").exists()


def test_tars_without_samples_are_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [])
    assert "no usable sample: its shards are empty" in refused(tmp_path / "data", tmp_path / "out")


def _empty(folder: Path) -> str:
    return str(folder)


def _other_files(folder: Path) -> str:
    (folder / "a.jpg").write_bytes(b"")
    (folder / "b.yaml").write_bytes(b"")
    return str(folder)


def _compressed(folder: Path) -> str:
    (folder / "0.tar.gz").write_bytes(b"")
    write_tar(folder / "1.tar", healthy(1))
    return str(folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            lambda folder: str(folder / "missing"),
            ["missing does not exist", "allowed: a folder with .tar files", "fix: name the folder"],
        ),
        (_empty, ["holds no .tar, .parquet, .csv or .tsv file (0 other files)", "allowed: a folder with .tar files"]),
        (_other_files, ["(2 other files)"]),
        (_compressed, ["holds compressed tars (1, the first: ", "0.tar.gz)", "allowed: plain .tar", "unpack them"]),
        (lambda folder: str(folder / "*.tar"), ["*.tar holds no .tar, .parquet, .csv or .tsv file (0 other files)"]),
        (
            lambda folder: "nosuchprotocol://bucket/x",
            ["nosuchprotocol://bucket/x cannot be opened", "Protocol not known"],
        ),
    ],
    ids=["missing", "empty", "other files", "compressed", "glob of nothing", "protocol"],
)
def test_a_source_without_tars_is_an_error(tmp_path: Path, source: Callable[[Path], str], message: list[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    found = refused([source(data)], tmp_path / "out")
    assert all(part in found for part in message), found
    assert not (tmp_path / "out").exists(), "nothing is begun"


def test_an_out_that_cannot_be_is_an_error(finished: Built, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in refused(finished.data, tmp_path / "file")
    assert r"holds ? \, which DuckDB takes for a pattern or a folder" in refused(finished.data, tmp_path / r"a?\b")


def test_an_out_with_blanks_commas_and_quotes_works(finished: Built, tmp_path: Path) -> None:
    out = tmp_path / "it's mine, not $yours; {x}"
    build(finished.data, out)
    assert preprocess("verify", out).code == 0
    assert "22" in preprocess("sql", out, "SELECT count(*) FROM labels").out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda out: (out / "manifest.json").write_text('{"format": 99, "new": 1}'), "is of format 99"),
        (lambda out: (out / "manifest.json").write_text('{"format": 1}'), "manifest.json is damaged"),
        (lambda out: (out / "manifest.json").unlink(), "has no manifest.json"),
    ],
)
def test_a_bad_manifest_is_an_error(built: Built, spoil: Callable[[Path], object], message: str) -> None:
    spoil(built.out)
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(built.out)
    assert "preprocess build-labels" in str(caught.value)
    build(built.data, built.out)
    assert preprocess("verify", built.out).code == 0


def test_no_out_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist or is not a folder"):
        read_manifest(tmp_path / "none")
