"""Betons: the tar's own bytes inside, in FFCV's format, read by its stock Loader with no custom field."""

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Built
from PIL import Image
from shard_factory import build, encode, healthy, pixels, sample, write_tar
from stock_loader import read_beton, stock_process

from labels import beton
from labels.manifest import read_manifest
from labels.schema import PAD_ID
from labels.sparse import pad_rows
from preprocess.beton_writer import BetonWriter

LIMIT = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Shard 0: small images, one turned into JPEG, one bad. Shard 1: more bytes than a page."""
    folder = tmp_path_factory.mktemp("betons")
    png = encode(Image.fromarray(pixels(77)), "PNG")
    write_tar(folder / "data" / "0.tar", [*healthy(7), *sample("bad", "a cat", b"junk"), *sample("png", "a dog", png), *healthy(3, 20)])
    write_tar(folder / "data" / "1.tar", healthy(40, 100, side=256))
    build(folder / "data", folder / "out", "--set", f"labels.context={LIMIT}")
    return Built(folder / "data", folder / "out")


@pytest.fixture(scope="module")
def stock() -> Iterator[ProcessPoolExecutor]:
    with stock_process() as pool:
        yield pool


def parsed(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Header, metadata and the file's bytes, by the layout of labels/beton.py."""
    data = np.fromfile(path, np.uint8)
    header = data[: beton.HEADER.itemsize].view(beton.HEADER)[0]
    end = beton.METADATA_OFFSET + int(header["num_samples"]) * beton.METADATA.itemsize
    return header, data[beton.METADATA_OFFSET : end].view(beton.METADATA), data


def images_of(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {name.removesuffix(".jpg"): archive.extractfile(name).read() for name in archive.getnames() if name.endswith(".jpg")}  # type: ignore[union-attr]


def expected_rows(out: Path, shard: str) -> tuple[list[str], np.ndarray]:
    """Keys and padded label rows of a shard, from its label file."""
    table = pq.read_table(out / "labels" / f"{shard}.parquet")
    lists = table["label_ids"].to_pylist()
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])])
    return table["key"].to_pylist(), pad_rows(np.array([token for row in lists for token in row], np.int32), offsets, LIMIT)


@pytest.mark.parametrize("number", [0, 1])
def test_images_are_the_very_bytes_of_the_tar(dataset: Built, number: int) -> None:
    header, metadata, data = parsed(dataset.out / "beton" / f"{number:05d}.beton")
    originals = images_of(dataset.data / f"{number}.tar")
    keys, labels = expected_rows(dataset.out, str(number))
    first = read_manifest(dataset.out).shards[number].first_index
    allocations = data[int(header["alloc_table_ptr"]) :].view(beton.ALLOCATION).reshape(-1, 2)
    assert len(metadata) == len(allocations) == len(originals) - (number == 0)
    for position, (row, (image, ids)) in enumerate(zip(metadata, allocations, strict=True)):
        key = keys[row["index"] - first]
        stored = data[image["ptr"] : image["ptr"] + image["size"]].tobytes()
        assert stored == originals[key] or key == "png"
        with Image.open(io.BytesIO(stored)) as picture:
            assert picture.format == "JPEG" and picture.size == (row["image"]["width"], row["image"]["height"])
        assert row["image"]["data_ptr"] == image["ptr"] and row["labels_ptr"] == ids["ptr"]
        assert image["sample_id"] == ids["sample_id"] == position
        assert data[ids["ptr"] : ids["ptr"] + ids["size"]].view("<i4").tolist() == labels[row["index"] - first].tolist()
        pages = {int(at) // int(header["page_size"]) for at in (image["ptr"], ids["ptr"] + ids["size"] - np.uint64(1))}
        assert len(pages) == 1, "a sample lies on one page"


def test_the_second_beton_has_several_pages(dataset: Built) -> None:
    header, metadata, _ = parsed(dataset.out / "beton" / "00001.beton")
    assert header["page_size"] == beton.MIN_PAGE_BYTES
    assert len(np.unique(metadata["labels_ptr"] // header["page_size"])) > 1


def test_rows_are_numbered_through_all_shards(dataset: Built) -> None:
    found = [parsed(dataset.out / "beton" / f"{number:05d}.beton")[1]["index"].tolist() for number in range(2)]
    assert found == [[*range(7), *range(8, 12)], list(range(12, 52))], "row 7 has no image, and keeps its number"


@pytest.mark.parametrize(("number", "os_cache"), [(0, True), (0, False), (1, True), (1, False)])
def test_a_stock_ffcv_loader_reads_every_beton(dataset: Built, stock: ProcessPoolExecutor, number: int, os_cache: bool) -> None:
    path = dataset.out / "beton" / f"{number:05d}.beton"
    images, labels, index = stock.submit(read_beton, path, os_cache).result(timeout=300)
    _, metadata, data = parsed(path)
    first = read_manifest(dataset.out).shards[number].first_index
    assert index.ravel().tolist() == metadata["index"].tolist()
    assert labels.dtype == np.int32 and labels.tolist() == expected_rows(dataset.out, str(number))[1][index.ravel() - first].tolist()
    assert (labels == PAD_ID).any()
    for image, row in zip(images, metadata, strict=True):
        with Image.open(io.BytesIO(data[row["image"]["data_ptr"] : row["labels_ptr"]].tobytes())) as picture:
            expected = np.asarray(picture).astype(int)
        # FFCV decodes with libjpeg's fast transform: near, not equal; another image would differ by about 80.
        assert np.abs(expected - image.reshape(expected.shape)).mean() < 2


def test_the_label_limit_can_be_read_back() -> None:
    assert [beton.label_limit_of(beton.field_descriptors(limit)) for limit in (1, 75, 1000)] == [1, 75, 1000]


def test_a_page_holds_the_largest_sample() -> None:
    found = [beton.page_bytes_for(size) for size in (0, 1, 1 << 21, (1 << 21) + 1, 1 << 22, 1 << 31)]
    assert found == [1 << 21, 1 << 21, 1 << 21, 1 << 22, 1 << 22, 1 << 31]


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    row = np.full(LIMIT, PAD_ID, np.int32)
    with BetonWriter(tmp_path / "b", 2, beton.MIN_PAGE_BYTES, LIMIT) as writer:
        with pytest.raises(ValueError, match="does not fit a page of 2097152"):
            writer.add(b"x" * beton.MIN_PAGE_BYTES, 1, 1, row, 0)
        with pytest.raises(ValueError, match="a label row of 11 ids, not 12"):
            writer.add(b"x", 1, 1, row[1:], 0)
        writer.add(b"x" * (beton.MIN_PAGE_BYTES - 4 * LIMIT), 1, 1, row, 0)
        writer.add(b"y", 1, 1, row, 1)
    header, metadata, data = parsed(tmp_path / "b")
    assert header["num_samples"] == 2 and metadata["image"]["data_ptr"].tolist() == [1 << 21, 2 << 21]
    assert bytes(data[2 << 21 : (2 << 21) + 1]) == b"y"
