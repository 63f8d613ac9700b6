"""`build-labels --no-images`: offsets of the JPEGs in the user's own tars, in place of betons."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labels import beton
from labels.manifest import IMAGE_SPAN, Source, open_image_index, read_manifest, read_sources, write_sources
from labels.storage import Layout, UserError
from shard_factory import (
    Built,
    build,
    contents,
    encode,
    flip_bit,
    healthy,
    jpeg,
    pixels,
    preprocess,
    quarantined,
    refused,
    sample,
    write_tar,
)

SMALL = ("--set", "build.beton_samples=8", "--set", "build.max_bad_fraction=0.5")
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Three tars of good JPEGs; the last also has what cannot be read in place, and a long name that only the slow
    walk reads.
    """
    folder = tmp_path_factory.mktemp("places")
    picture = Image.fromarray(pixels(3, 40, 24))
    odd = [
        *sample("exif", "a cat", encode(picture, exif=TURNED)),
        *sample("grey", "a cat", encode(picture.convert("L"))),
        *sample("cut", "a cat", jpeg(5, 64, 64)[:-900]),
        *sample("junk", "a cat", b"no image"),
        *sample("p" * 120, "a dog", jpeg(6)),
        ("png.png", encode(picture, "PNG")),
        ("png.txt", b"a png"),
    ]
    for number in range(3):
        write_tar(folder / "data" / f"{number}.tar", [*healthy(10, 10 * number), *(odd if number == 2 else [])])
    build(folder / "data", folder / "out", "--no-images", *SMALL)
    return Built(folder / "data", folder / "out")


def all_spans(out: Path) -> np.ndarray:
    return np.concatenate(
        [open_image_index(Layout(out).image_index_file(part.number)) for part in read_manifest(out).image_index]
    )


def test_every_span_holds_the_jpeg_of_its_row(dataset: Built) -> None:
    manifest, spans = read_manifest(dataset.out), all_spans(dataset.out)
    assert manifest.betons == [] and not (dataset.out / "beton").exists()
    assert [(part.number, part.shards, part.samples) for part in manifest.image_index] == [
        (0, ["0"], 5),
        (1, ["0"], 5),
        (2, ["1"], 5),
        (3, ["1"], 5),
        (4, ["2"], 8),
        (5, ["2"], 3),
    ]
    assert manifest.samples == len(spans) == 31
    sources = read_sources(Layout(dataset.out))
    assert sources == {
        str(n): Source(str(tar), tar.stat().st_size) for n, tar in enumerate(sorted(dataset.data.iterdir()))
    }
    for number, span in enumerate(spans[:30]):
        tar = Path(sources[manifest.shards[span["shard"]].name].path).read_bytes()
        assert tar[span["offset"] :][: span["bytes"]] == jpeg(number, 32, 32)
        assert (span["index"], span["width"], span["height"], span["pad"]) == (number, 32, 32, 0)


def test_an_image_that_cannot_be_read_in_place_is_quarantined_with_a_reason(dataset: Built) -> None:
    assert [(key, reason) for _, key, stage, reason in quarantined(dataset.out) if stage == "images"] == [
        ("exif", "not a plain JPEG"),
        ("grey", "not a plain JPEG"),
        ("cut", "image cut or damaged"),
        ("junk", "not an image"),
        ("png", "not a plain JPEG"),
    ]


@pytest.mark.parametrize("window", [1, 2])
def test_the_same_samples_in_the_same_order_as_in_betons(tmp_path: Path, window: int) -> None:
    for number in range(3):
        write_tar(tmp_path / "data" / f"{number}.tar", healthy(7, 7 * number))
    settings = (*SMALL, "--set", f"build.shuffle_window={window}")
    build(tmp_path / "data", tmp_path / "places", "--no-images", *settings)
    build(tmp_path / "data", tmp_path / "betons", *settings)
    betons, indexed = read_manifest(tmp_path / "betons"), read_manifest(tmp_path / "places")
    excluded = {"bytes", "sha256"}
    assert [part.model_dump(exclude=excluded) for part in betons.betons] == [
        part.model_dump(exclude=excluded) for part in indexed.image_index
    ]
    for part in betons.betons:
        data = np.fromfile(Layout(tmp_path / "betons").beton_file(part.number), np.uint8)
        metadata = data[beton.METADATA_OFFSET :][: part.samples * beton.METADATA.itemsize].view(beton.METADATA)
        found = open_image_index(Layout(tmp_path / "places").image_index_file(part.number))
        assert found["index"].tolist() == metadata["index"].tolist()
        for name in ("width", "height"):
            assert found[name].tolist() == metadata["image"][name].tolist()
        assert found["bytes"].tolist() == (metadata["labels_ptr"] - metadata["image"]["data_ptr"]).tolist()
    indices = all_spans(tmp_path / "places")["index"].tolist()
    assert sorted(indices) == list(range(21)) and (indices == sorted(indices)) == (window == 1)


def test_any_number_of_workers_and_resume(dataset: Built, tmp_path: Path) -> None:
    expected = contents(dataset.out)
    build(dataset.data, tmp_path / "out", "--no-images", *SMALL, workers=2)
    assert contents(tmp_path / "out") == expected
    (tmp_path / "out" / "done" / "places" / "00002.json").unlink()
    (tmp_path / "out" / "places" / "00004.npy").unlink()
    build(dataset.data, tmp_path / "out", "--no-images", *SMALL)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
def test_verify_finds_damaged_index_files_and_the_command_fixes_them(
    dataset: Built, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(dataset.out, out)
    path = out / "places" / "00003.npy"
    if damage == "bit":
        flip_bit(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    said = preprocess("verify", out)
    assert said.code == 1 and str(path) in said.out.splitlines()[0] and len(said.out.splitlines()) == 2
    build(dataset.data, out, "--no-images", *SMALL)
    assert contents(out) == contents(dataset.out) and preprocess("verify", out).code == 0


def test_verify_looks_for_the_tars(dataset: Built, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(dataset.data, data)
    build(data, out, "--no-images", *SMALL)
    assert preprocess("verify", out).code == 0
    moved = tmp_path / "moved.tar"
    (data / "1.tar").rename(moved)
    said = preprocess("verify", out)
    assert (
        said.code == 1
        and f"1.tar: missing, but images of 1 are in it; if it was moved, write its path into {out}/places/sources.json"
        in said.out
    )
    write_sources(Layout(out), read_sources(Layout(out)) | {"1": Source(str(moved), moved.stat().st_size)})
    assert preprocess("verify", out).code == 0
    moved.write_bytes(moved.read_bytes()[:-512])
    assert f"{moved}: {moved.stat().st_size} bytes, in the manifest" in preprocess("verify", out).out
    (out / "places" / "sources.json").write_text("{")
    assert "sources.json cannot be read" in preprocess("verify", out).out


def test_an_image_index_can_be_appended(dataset: Built, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(dataset.out, out)
    write_tar(tmp_path / "more" / "3.tar", healthy(4, 200))
    before = all_spans(out)
    assert preprocess("append", out, tmp_path / "more", "--workers", 1).code == 0
    after = all_spans(out)
    assert after[: len(before)].tolist() == before.tolist() and after[len(before) :]["shard"].tolist() == [3] * 4
    assert list(read_sources(Layout(out))) == ["0", "1", "2", "3"] and preprocess("verify", out).code == 0


def test_a_shard_without_offsets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("path,caption\nimage.jpg,a cat\n")
    message = refused([tmp_path / "pairs.csv"], tmp_path / "out", "--no-images")
    assert (
        "cannot be read in place" in message
        and "uncompressed tars on local disks" in message
        and "run without --no-images" in message
    )
    write_tar(tmp_path / "data" / "0.tar", healthy(1))
    assert "--no-beton and --no-images are both given" in refused(
        tmp_path / "data", tmp_path / "out", "--no-images", "--no-beton"
    )


def test_a_file_of_another_form_is_reported(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"a\.npy holds float64 \[3\], or is truncated"):
        open_image_index(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.zeros(3, IMAGE_SPAN))
    with open(tmp_path / "b.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="or is truncated"):
        open_image_index(tmp_path / "b.npy")
