"""Betons: the tar's own bytes inside, in FFCV's format, read by its stock Loader with no custom field."""

import errno
import fcntl
import io
import os
import resource
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from labels import beton
from labels.arrays import pad_rows
from labels.manifest import PAD_ID, read_manifest
from labels.storage import sha256_file
from preprocess.betons.write import DirectFile, Samples, aligned_buffer, choose_page, write_beton
from shard_factory import Built, build, encode, healthy, jpeg, pixels, sample, write_tar
from stock_loader import read_beton, stock_process

LIMIT = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Shard 0: small images, one turned into JPEG, one bad. Shard 1: more bytes than a page."""
    folder = tmp_path_factory.mktemp("betons")
    png = encode(Image.fromarray(pixels(77)), "PNG")
    write_tar(
        folder / "data" / "0.tar",
        [*healthy(7), *sample("bad", "a cat", b"junk"), *sample("png", "a dog", png), *healthy(3, 20)],
    )
    write_tar(folder / "data" / "1.tar", healthy(40, 100, side=256))
    build(folder / "data", folder / "out", "--set", f"labels.context={LIMIT}", "--set", "build.beton_samples=40")
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
        return {
            name.removesuffix(".jpg"): archive.extractfile(name).read()
            for name in archive.getnames()
            if name.endswith(".jpg")
        }  # type: ignore[union-attr]


def expected_rows(out: Path, shard: str) -> tuple[list[str], np.ndarray]:
    """Keys and padded label rows of a shard, from its label file."""
    table = pq.read_table(out / "labels" / f"{shard}.parquet")
    lists = table["label_ids"].to_pylist()
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists])])
    return table["key"].to_pylist(), pad_rows(
        np.array([token for row in lists for token in row], np.int32), offsets, LIMIT
    )


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
        assert len(pages) == 1, "a sample is on one page"


def test_the_second_beton_has_several_pages(dataset: Built) -> None:
    header, metadata, _ = parsed(dataset.out / "beton" / "00001.beton")
    assert header["page_size"] == beton.MIN_PAGE_BYTES
    assert len(np.unique(metadata["labels_ptr"] // header["page_size"])) > 1


def test_rows_are_numbered_through_all_shards(dataset: Built) -> None:
    found = [parsed(dataset.out / "beton" / f"{number:05d}.beton")[1]["index"].tolist() for number in range(2)]
    assert found == [[*range(7), *range(8, 12)], list(range(12, 52))], "row 7 has no image, and keeps its number"


def test_a_stock_ffcv_loader_reads_a_beton_of_two_shuffled_shards(stock: ProcessPoolExecutor, tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [*healthy(12), *sample("bad", "a cat", b"junk")])
    write_tar(tmp_path / "data" / "1.tar", healthy(20, 100))
    build(tmp_path / "data", tmp_path / "out", "--set", f"labels.context={LIMIT}", "--set", "build.shuffle_window=2")
    assert [part.shards for part in read_manifest(tmp_path / "out").betons] == [["0", "1"]]
    path = tmp_path / "out" / "beton" / "00000.beton"
    images, labels, index = stock.submit(read_beton, path, True).result(timeout=300)
    rows = index.ravel().tolist()
    assert sorted(rows) == [*range(12), *range(13, 33)] and rows != sorted(rows)
    assert len({row < 13 for row in rows[:12]}) == 2, "neighbours come from both"
    keys, expected = (
        np.concatenate(parts) for parts in zip(*(expected_rows(tmp_path / "out", name) for name in "01"), strict=True)
    )
    assert labels.tolist() == expected[rows].tolist()
    originals = images_of(tmp_path / "data" / "0.tar") | images_of(tmp_path / "data" / "1.tar")
    _, metadata, data = parsed(path)
    for image, row, key in zip(images, metadata, keys[rows], strict=True):
        stored = data[row["image"]["data_ptr"] : row["labels_ptr"]].tobytes()
        assert stored == originals[key]
        with Image.open(io.BytesIO(stored)) as picture:
            expected_pixels = np.asarray(picture).astype(int)
        assert np.abs(expected_pixels - image.reshape(expected_pixels.shape)).mean() < 2


@pytest.mark.parametrize(("number", "os_cache"), [(0, True), (0, False), (1, True), (1, False)])
def test_a_stock_ffcv_loader_reads_every_beton(
    dataset: Built, stock: ProcessPoolExecutor, number: int, os_cache: bool
) -> None:
    path = dataset.out / "beton" / f"{number:05d}.beton"
    images, labels, index = stock.submit(read_beton, path, os_cache).result(timeout=300)
    _, metadata, data = parsed(path)
    first = read_manifest(dataset.out).shards[number].first_index
    assert index.ravel().tolist() == metadata["index"].tolist()
    assert (
        labels.dtype == np.int32
        and labels.tolist() == expected_rows(dataset.out, str(number))[1][index.ravel() - first].tolist()
    )
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


def samples_of(images: list[bytes], labels: np.ndarray) -> Samples:
    """Samples whose images follow each other in one file."""
    size = np.array([len(image) for image in images], np.int64)
    zeros = np.zeros(len(images), np.int64)
    data = np.frombuffer(b"".join(images), np.uint8)
    return Samples(
        [data], zeros, np.cumsum(size) - size, size, zeros + 3, zeros + 4, np.arange(len(images)) + 100, labels
    )


@given(
    sizes=st.lists(st.integers(1, 5 << 20) | st.integers(1, 3000), max_size=12),
    limit=st.sampled_from([1, 75]),
)
@settings(max_examples=25, deadline=None)
def test_every_sample_is_on_one_page_and_the_hash_is_the_files(
    sizes: list[int], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("writer") / "b"
    images = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    labels = np.arange(len(sizes) * limit, dtype=np.int32).reshape(-1, limit)
    length, digest = write_beton(path, samples_of(images, labels))
    assert (length, digest) == (path.stat().st_size, sha256_file(path))
    header, metadata, data = parsed(path)
    page = int(header["page_size"])
    assert header["num_samples"] == len(sizes) and page & (page - 1) == 0 and page >= beton.MIN_PAGE_BYTES
    assert metadata["index"].tolist() == list(range(100, 100 + len(sizes)))
    for image, row, label_row in zip(images, metadata, labels, strict=True):
        at, labels_at = int(row["image"]["data_ptr"]), int(row["labels_ptr"])
        assert data[at:labels_at].tobytes() == image
        assert data[labels_at : labels_at + 4 * limit].view("<i4").tolist() == label_row.tolist()
        assert at // page == (labels_at + 4 * limit - 1) // page and at >= page
    table = data[int(header["alloc_table_ptr"]) :].view(beton.ALLOCATION)
    assert len(table) == 2 * len(sizes)


@pytest.mark.parametrize("refused", ["", "open", "write"])
def test_a_file_written_past_the_cache_holds_all_bytes(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its file system has no such writes, and reports it at once or late."""
    direct = [0]

    def fail(flags: int) -> None:
        direct[0] += bool(flags & os.O_DIRECT)
        if flags & os.O_DIRECT and refused:
            raise OSError(errno.EINVAL, "Invalid argument")

    def open_file(path: Path, flags: int, mode: int) -> int:
        if refused == "open":
            fail(flags)
        return plain_open(path, flags, mode)

    def write(descriptor: int, data: memoryview) -> int:
        fail(fcntl.fcntl(descriptor, fcntl.F_GETFL))
        return plain_write(descriptor, data[: 1 << 20])  # a system may take less than it is given

    plain_open, plain_write = os.open, os.write
    dice, parts = np.random.default_rng(0), []
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "write", write)
    with DirectFile(tmp_path / "file") as file:
        for size in (1 << 21, 1 << 21, 5000, 8192, 0, 7):
            parts.append(aligned_buffer(size))
            parts[-1][:] = dice.integers(0, 256, size)
            file.write(parts[-1])
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == np.concatenate(parts).tobytes()
    assert direct[0] == (1 if refused else 4)


def test_the_page_wastes_little() -> None:
    photos = np.random.default_rng(0).integers(20_000, 60_000, 1000)
    assert choose_page(photos)[0] == beton.MIN_PAGE_BYTES
    large = np.full(200, (1 << 20) + 1000)  # one to a page of 2 MiB would leave half of it empty
    page, starts = choose_page(large)
    assert page > beton.MIN_PAGE_BYTES and starts[-1] + large[-1] < 1.2 * large.sum()
    assert choose_page(np.append(photos, 5 << 20))[0] == 1 << 23, "four times the largest image would be 32 MiB"
    with pytest.raises(ValueError, match="does not fit a page of 2147483648"):
        choose_page(np.array([beton.MAX_PAGE_BYTES + 1]))


@pytest.mark.parametrize(("kind", "options"), [("tars", []), ("tables", []), ("tars", ["--no-images"])])
def test_a_beton_of_more_shards_than_a_process_may_open(tmp_path: Path, kind: str, options: list[str]) -> None:
    for number in range(60):
        if kind == "tars":
            write_tar(tmp_path / "data" / f"{number}.tar", healthy(1, number))
        else:
            (tmp_path / "data").mkdir(exist_ok=True)
            table = pa.table({"image": [jpeg(number)], "caption": ["a cat"]})
            pq.write_table(table, tmp_path / "data" / f"{number}.parquet")
    build(tmp_path / "data", tmp_path / "out", "--no-beton")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, before[1]))
    try:
        build(tmp_path / "data", tmp_path / "out", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert read_manifest(tmp_path / "out").samples == 60
