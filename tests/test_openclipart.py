"""Tests for examples/openclipart: a few tiny SVG and PNG files stand in for the archive; no apt, no network.

caption and image rules -> split rule -> whole runs (layout, same bytes, marker) -> fake apt-get and dpkg-deb
"""

import io
import json
import stat
import struct
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from example_scripts import script

clipart_caption = script("clipart_caption")
clipart_image = script("clipart_image")
clipart_packages = script("clipart_packages")
clipart_pairs = script("clipart_pairs")
clipart_split = script("clipart_split")
make_shards = script("make_shards")

WORK = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>A. Painter</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata><g/></svg>"""


def svg_text(title: str, keywords: tuple[str, ...] = (), description: str = "") -> str:
    """An SVG with the archive's metadata block."""
    items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    return WORK.format(title=title, keywords=items, description=description)


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def drawing(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """A PNG whose colour, and so whose bytes, depend on the seed."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((seed * 7 % 256, seed * 31 % 256, seed * 101 % 256, 255), (5, 5, 25, 20))
    return png_bytes(image)


def bomb_bytes(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header claims a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def add_pair(root: Path, name: str, svg: str, png: bytes) -> None:
    """Files one drawing as the packages do."""
    for kind, data in (("svg", svg.encode()), ("png", png)):
        path = root / kind / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Thirty usable drawings in two categories, and one of each kind that has to be skipped."""
    root = tmp_path / "tree"
    for index in range(30):
        name = "".join(chr(ord("a") + int(digit)) for digit in f"{index:02d}") + "_thing"
        category = "zoology" if index % 2 else "vehicles/old"
        add_pair(root, f"{category}/{name}", svg_text(f"Drawing {index}", ("mot clé", "ключ")), drawing(index))
    add_pair(root, "zoology/bomb", svg_text("Bomb"), bomb_bytes(30_000, 30_000))
    add_pair(root, "zoology/large", svg_text("Large"), bomb_bytes(9_000, 6_000))
    add_pair(root, "zoology/torn", svg_text("Torn"), drawing(99, (300, 300))[:150])
    add_pair(root, "zoology/blank", svg_text("Blank"), png_bytes(Image.new("RGBA", (20, 20), (0, 0, 0, 0))))
    add_pair(root, "zoology/wordless", svg_text(" \n "), drawing(98))
    add_pair(root, "zoology/ragged", svg_text("Ragged").replace("<svg", "<svg a=1"), drawing(97))
    (root / "png/zoology/lonely.png").write_bytes(drawing(96))
    return root


def run(tree: Path, out: Path, *more: str) -> int:
    return make_shards.main(["--tree", str(tree), "--out", str(out), "--workers", "1", *more])


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shard_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert all((member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644) for member in members)
        return [(member.name, file.read()) for member in members if (file := tar.extractfile(member)) is not None]


def all_samples(out: Path) -> list[dict[str, Any]]:
    """Every sample's json, with its side."""
    return [
        {**json.loads(data), "split": split}
        for split in ("train", "test")
        for tar in sorted((out / split / "shards").glob("*.tar"))
        for name, data in shard_members(tar)
        if name.endswith(".json")
    ]


def caption_of(svg: str) -> tuple[str, bool]:
    caption = clipart_caption.read_caption(svg.encode())
    return caption.text, caption.lenient


def test_caption_is_title_keywords_description_in_any_language() -> None:
    svg = svg_text("  Vélo &amp; Fahrrad ", ("", "transport", " бицикл "), "自転車\nof old")
    assert caption_of(svg) == ("Vélo & Fahrrad. transport, бицикл. 自転車\nof old", False)


def test_caption_leaves_noise_as_it_is() -> None:
    assert caption_of(svg_text("a  b", ("hash(0x897d730)", "TOY"))) == ("a  b. hash(0x897d730), TOY", False)


def test_caption_without_metadata_or_words_is_empty() -> None:
    assert caption_of("<svg/>") == ("", False)
    assert caption_of(svg_text("")) == ("", False)


def test_caption_of_second_work_if_first_is_empty() -> None:
    both = svg_text("").replace("</cc:Work>", "</cc:Work><cc:Work><dc:title>second</dc:title></cc:Work>")
    assert caption_of(both) == ("second", False)


@pytest.mark.parametrize(
    "breakage",
    [
        ("</cc:Work>", ""),
        ("<svg ", "<svg viewBox=0 "),
        ("<dc:description>", "<dc:description>&nbsp;&undefined;"),
        ('"http://purl.org/dc/elements/1.1/"', '"a" xmlns:dc="b"'),
    ],
)
def test_caption_survives_broken_xml(breakage: tuple[str, str]) -> None:
    text, lenient = caption_of(svg_text("Chaussée", ("rue &amp; route",)).replace(*breakage))
    assert lenient
    assert text.startswith("Chaussée. rue & route")
    assert "Painter" not in text


def test_caption_never_expands_an_entity_bomb() -> None:
    entities = '<!ENTITY a "lol">' + "".join(
        f'<!ENTITY {chr(98 + index)} "{f"&{chr(97 + index)};" * 10}">' for index in range(12)
    )
    svg = f"<!DOCTYPE svg [{entities}]>" + svg_text("calm", ("&m;",))
    start = time.monotonic()
    assert caption_of(svg) == ("calm. &m;", True)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        ("dolphin_enrique_meza_c_02", "dolphin_enrique_meza"),
        ("cone3_bw_ganson", "cone_ganson"),
        ("cone1_ganson", "cone_ganson"),
        ("aiga_left_arrow_", "aiga_left_arrow"),
        ("aiga_left_arrow1", "aiga_left_arrow"),
        ("arrow3-2-2", "arrow"),
        ("people_juliane_krug_06b", "people_juliane_krug"),
        ("elder_sign_nurbldoff_01r", "elder_sign_nurbldoff"),
        ("star_98pt45step", "star_pt_step"),
        ("gear-v2", "gear"),
        ("plastik_icon_v0.9", "plastik_icon"),
        ("white_d_q", "white"),
        ("Evel_Knievel", "evel_knievel"),
        ("70a002", "70a"),
        ("12", "12"),
        ("x", "x"),
    ],
)
def test_variant_key(stem: str, key: str) -> None:
    assert clipart_split.variant_key(stem) == key


def sample(url: str, jpeg: bytes, svg_sha256: str) -> Any:
    picture = clipart_image.Picture(jpeg, 1, 1, 1, 1)
    return clipart_pairs.Sample(url, "class", "caption", "png", svg_sha256, picture)


def test_split_holds_out_a_tenth_and_keeps_variants_together() -> None:
    samples = [
        sample(f"openclipart/c{copy}/{chr(97 + index // 26) * 3}{chr(97 + index % 26) * 3}_{copy}.png", url, url.hex())
        for index in range(200)
        for copy in range(3)
        for url in [f"{index} {copy}".encode()]
    ]
    sides = clipart_split.split_samples(samples)
    assert sides == clipart_split.split_samples(samples[::-1])
    assert len(sides["test"]) == 60
    stems = {side: {Path(one.url).stem[:6] for one in members} for side, members in sides.items()}
    assert not stems["train"] & stems["test"]
    assert [one.uid for one in sides["train"]] == sorted(one.uid for one in sides["train"])


def test_split_joins_equal_images_and_equal_drawings_under_other_names() -> None:
    samples = [sample("a/cat.png", b"1", "s1"), sample("b/dog.png", b"1", "s2"), sample("c/cow.png", b"2", "s2")]
    groups = clipart_split.joined_groups([clipart_split.sample_keys(one) for one in samples])
    assert [sorted(group) for group in groups] == [[0, 1, 2]]


def test_split_never_tests_on_one_large_family() -> None:
    family = [sample(f"shapes/star_{index}.png", str(index).encode(), str(index)) for index in range(2000)]
    assert not clipart_split.split_samples(family)["test"]


def picture_of(path: Path, image: Image.Image) -> tuple[Any, Image.Image]:
    path.write_bytes(png_bytes(image))
    picture = clipart_image.make_picture(path)
    return picture, Image.open(io.BytesIO(picture.jpeg))


def close_to(pixel: Any, wanted: tuple[int, int, int]) -> bool:
    return all(abs(got - want) <= 3 for got, want in zip(pixel, wanted, strict=True))


def palette_image() -> Image.Image:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 16, 32))
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_turn_white(mode: str, tmp_path: Path) -> None:
    if mode == "P":
        image, left = palette_image(), (255, 0, 0)
    else:
        image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        image.paste((0, 0, 0, 128), (0, 0, 16, 32))
        image, left = image.convert(mode), (127, 127, 127)
    _, jpeg = picture_of(tmp_path / "a.png", image)
    assert (jpeg.format, jpeg.mode) == ("JPEG", "RGB")
    assert close_to(jpeg.getpixel((4, 16)), left)
    assert close_to(jpeg.getpixel((28, 16)), (255, 255, 255))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((1200, 300), (512, 128)), ((40, 20), (40, 20)), ((3000, 2), (512, 1)), ((512, 512), (512, 512))],
)
def test_longest_side_is_capped_and_nothing_enlarged(
    size: tuple[int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    picture, jpeg = picture_of(tmp_path / "a.png", Image.new("RGB", size, (9, 99, 199)))
    assert jpeg.size == wanted == (picture.width, picture.height)
    assert size == (picture.original_width, picture.original_height)


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 9_500), (9_000, 6_000)])
def test_bombs_are_refused_by_their_header(size: tuple[int, int], tmp_path: Path) -> None:
    guard = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb_bytes(*size))
    with pytest.raises(clipart_image.SkippedImageError, match="too_many_pixels"):
        clipart_image.make_picture(path)
    assert guard == Image.MAX_IMAGE_PIXELS is not None


def test_layout(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tree, out, "--samples-per-shard", "10") == 0
    shards = out / "train" / "shards"
    names = sorted(path.name for path in shards.iterdir())
    assert names == sorted(f"0000000{i}{end}" for i in range(3) for end in (".tar", ".parquet", "_stats.json"))
    members = shard_members(shards / "00000001.tar")
    assert [name for name, _ in members[:4]] == [
        "000000010000.jpg",
        "000000010000.txt",
        "000000010000.json",
        "000000010001.jpg",
    ]
    fields = json.loads(members[2][1])
    assert fields["key"] == "000000010000"
    assert fields["caption"] == members[1][1].decode()
    assert (fields["status"], fields["error_message"], fields["exif"]) == ("success", None, "{}")
    assert fields["class"] in ("zoology", "vehicles")
    assert fields["url"].startswith(f"openclipart/{fields['class']}/")
    assert Image.open(io.BytesIO(members[0][1])).size == (fields["width"], fields["height"])
    row = pq.read_table(shards / "00000001.parquet").to_pylist()[0]
    assert row == {name: fields[name] for name in row}
    assert set(fields) - set(row) == {"face_bboxes"}
    pool = pq.read_table(out / "train" / "metadata").to_pylist()
    assert [len(one["uid"]) for one in pool] == [32] * 28
    assert {one["uid"]: one["text"] for one in pool}[fields["uid"]] == fields["caption"]
    assert pool[0]["clip_b32_similarity_score"] is None
    stats = json.loads((shards / "00000001_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (10, 10, 0)


def test_counts_and_captions(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tree, out) == 0
    marker = json.loads((out / "openclipart.json").read_text())
    assert marker["pairs"] == 36
    assert marker["skipped"] == {"blank_image": 1, "no_text": 1, "too_many_pixels": 2, "unreadable_image": 1}
    assert marker["captions_from_broken_xml"] == 1
    assert (marker["splits"]["train"]["samples"], marker["splits"]["test"]["samples"]) == (28, 3)
    samples = all_samples(out)
    assert len({one["uid"] for one in samples}) == len(samples) == 31
    assert "Ragged" in {one["caption"] for one in samples}
    assert not [one for one in samples if "zoology" in one["caption"] or "vehicles" in one["caption"]]
    train = [one["class"] for one in samples if one["split"] == "train"]
    assert train != sorted(train)


def test_same_bytes_for_any_number_of_workers(tree: Path, tmp_path: Path) -> None:
    assert run(tree, tmp_path / "one") == 0
    assert run(tree, tmp_path / "two", "--workers", "2") == 0
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def test_second_run_is_done_already(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(tree, out)
    capsys.readouterr()
    assert make_shards.main(["--out", str(out), "--tree", str(tmp_path / "gone")]) == 0
    assert "done already" in capsys.readouterr().out


def test_other_options_or_lost_shards_are_made_again(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(tree, out)
    whole = all_bytes(out)
    run(tree, out, "--samples-per-shard", "5")
    assert len(list((out / "train" / "shards").glob("*.tar"))) == 6
    run(tree, out)
    assert all_bytes(out) == whole
    (out / "test" / "shards" / "00000000_stats.json").unlink()
    run(tree, out)
    assert all_bytes(out) == whole
    assert "done already" not in capsys.readouterr().out


def test_killed_run_starts_over(tree: Path, tmp_path: Path) -> None:
    run(tree, tmp_path / "whole")
    out = tmp_path / "killed"
    half = out / make_shards.PART_FOLDER / "train" / "shards" / "00000007.tar"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a shard")
    (out / "train").mkdir()  # killed between moving the folders and writing the marker
    assert run(tree, out) == 0
    assert all_bytes(out) == all_bytes(tmp_path / "whole")


def test_folders_of_others_are_left_alone(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "train" / "mine.txt"
    precious.parent.mkdir()
    precious.write_text("keep")
    assert run(tree, tmp_path) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert precious.read_text() == "keep"


def test_tree_without_pairs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, tmp_path / "out") == 1
    assert "holds no pairs" in capsys.readouterr().err


def fake_tool(folder: Path, name: str, script: str) -> None:
    """A shell script under a Debian tool's name; writes down how it was called."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_packages_are_downloaded_once_after_one_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, cache = tmp_path / "tools", tmp_path / "cache"
    apt = f"""case $1 in
    update) touch {tools}/updated ;;
    download) [ -e {tools}/updated ] || exit 100; shift; for name; do echo > "${{name}}_1%3a0.18-1_all.deb"; done ;;
    esac"""
    fake_tool(tools, "apt-get", apt)
    fake_tool(tools, "dpkg-deb", 'mkdir -p "$3/usr/share/openclipart"')
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    first = clipart_packages.fetch_tree(cache)
    assert first.packages == ("openclipart-svg_1%3a0.18-1_all.deb", "openclipart-png_1%3a0.18-1_all.deb")
    assert first.root == cache / "unpacked-1-0.18-1" / "usr/share/openclipart"
    assert first.root.is_dir()
    calls = (tools / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["download", "update", "download", "-x", "-x"]
    assert clipart_packages.fetch_tree(cache) == first
    assert (tools / "calls").read_text().splitlines() == calls


def test_failed_download_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "apt-get", "echo 'no such package' >&2; exit 100")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(clipart_packages.PackageError, match=r"no such package[\s\S]*apt-get update"):
        clipart_packages.fetch_tree(tmp_path / "cache")


def test_missing_tools_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make_shards.main(["--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "apt-get not found" in error
    assert "--tree" in error


@pytest.mark.parametrize("wrong", [("--samples-per-shard", "10001"), ("--samples-per-shard", "0"), ("--workers", "0")])
def test_wrong_numbers_are_usage_errors(wrong: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        make_shards.main(["--out", str(tmp_path), *wrong])
