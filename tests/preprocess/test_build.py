"""`preprocess build-labels`: the rows as promised, the same bytes however it was run, resume, and what is refused."""

import os
import shutil
import socket
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from labels.config import load_pipeline
from labels.locks import only_writer
from labels.manifest import LABELS, QUARANTINE, read_manifest
from labels.storage import Layout
from labels.tokenizers.kinds.clip import ClipTokenizer
from preprocess import shard as label_job
from shard_factory import (
    Built,
    build,
    contents,
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


def inodes(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_ino for path in out.rglob("*") if path.is_file()}


def written_since(out: Path, before: dict[str, int]) -> list[str]:
    """Names of the files in the label dataset that were written since `before = inodes(out)`."""
    return sorted(name for name, inode in inodes(out).items() if before.get(name) != inode)


def test_rows_are_as_promised(tmp_path: Path) -> None:
    caption = "The CAT, the dog &amp; the cat"
    write_tar(
        tmp_path / "a.tar",
        [
            *sample("0", caption, uid="u0", width=640, height=480),
            *sample("1", None, jpeg(1, 20, 10), caption="from the dog", uid=7),
            *sample("2", "x", width=2**40, height=True),
            *sample("3", "word " * 200),
        ],
    )
    build(tmp_path, tmp_path / "out")
    first, second, third, fourth = rows(tmp_path / "out")
    tokens = ClipTokenizer().tokens
    assert [tokens[token] for token in first["token_ids"]] == [
        f"{word}</w>" for word in ("the", "cat", ",", "the", "dog", "&", "the", "cat")
    ]
    assert first["label_ids"] == sorted(set(first["token_ids"])) and len(first["label_ids"]) == 5
    assert (first["key"], first["uid"], first["width"], first["height"]) == ("0", "u0", 640, 480)
    assert [tokens[token] for token in second["token_ids"]] == ["from</w>", "the</w>", "dog</w>"]
    assert (second["uid"], second["width"], second["height"]) == (None, 20, 10)
    assert (third["uid"], third["width"], third["height"]) == (None, 32, 32)
    assert len(fourth["token_ids"]) == 75 and len(fourth["label_ids"]) == 1


def test_schemas_are_explicit(finished: Built) -> None:
    for path in (finished.out / "labels").iterdir():
        assert pq.read_schema(path).equals(LABELS, check_metadata=True)
    assert pq.read_schema(finished.out / "quarantine.parquet").equals(QUARANTINE, check_metadata=True)


def test_the_manifest_and_the_configuration_describe_the_build(finished: Built) -> None:
    manifest = read_manifest(finished.out)
    assert [(shard.name, shard.first_index, shard.rows) for shard in manifest.shards] == [
        ("00000000", 0, 12),
        ("00000001", 12, 10),
    ]
    assert [(beton.number, beton.shards, beton.samples) for beton in manifest.betons] == [
        (0, ["00000000", "00000001"], 21)
    ]
    assert manifest.captions == 22 and manifest.samples == 21 and manifest.label_limit == 75
    assert quarantined(finished.out) == [
        ("00000000", "000000100", "labels", "caption is not UTF-8"),
        ("00000001", "000000101", "images", "not an image"),
    ]
    written, expected = load_pipeline(Layout(finished.out).config), load_pipeline()
    assert written.evaluators == {}, "they decide nothing of a build"
    assert written.model_copy(update={"evaluators": expected.evaluators}) == expected
    assert not list(finished.out.rglob("*.partial"))
    assert str(finished.data) not in (finished.out / "manifest.json").read_text(), "nothing of the machine"


def test_the_summary_names_what_was_rejected(finished: Built, tmp_path: Path) -> None:
    said = preprocess("build-labels", finished.data, "--out", tmp_path / "out")
    assert "22 label rows from 2 shards, vocabulary 49,408" in said.out and "21 samples in 1 beton," in said.out
    assert "quarantined: 2 (1 x caption is not UTF-8, 1 x not an image)" in said.out
    assert "labels: 2/2 shards, 22 samples" in said.err and "ETA" in said.err


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 6, 5)
    write_tar(data / "00000003.tar", [*healthy(3, 15), *sample("x", None), *sample("y", "bad", b"-")])
    for workers in (1, 2, 5):
        build(data, tmp_path / str(workers), workers=workers)
    expected = contents(tmp_path / "1")
    assert contents(tmp_path / "2") == expected
    assert contents(tmp_path / "5") == expected


def test_a_rerun_does_nothing_and_changes_nothing(built: Built) -> None:
    before, files = contents(built.out), inodes(built.out)
    build(built.data, built.out)
    assert contents(built.out) == before
    assert written_since(built.out, files) == ["config.yaml", "manifest.json", "quarantine.parquet"]


def test_labels_first_and_betons_later_is_the_same(finished: Built, tmp_path: Path) -> None:
    build(finished.data, tmp_path / "out", "--no-beton")
    assert read_manifest(tmp_path / "out").betons == [] and not (tmp_path / "out" / "beton").exists()
    build(finished.data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(finished.out)


@pytest.mark.parametrize("changed", ["captions", "images"])
def test_a_changed_tar_is_built_again(tmp_path: Path, changed: str) -> None:
    data, each = write_shards(tmp_path / "data", 2, 4), ("--set", "build.beton_samples=4")
    build(data, tmp_path / "out", *each)
    old = inodes(tmp_path / "out")
    members = [
        (
            name,
            jpeg(99)
            if changed == "images" and name.endswith("jpg")
            else b"new"
            if changed == "captions" and name.endswith("txt")
            else data,
        )
        for name, data in healthy(4, 4)
    ]
    path = write_tar(data / "00000001.tar", members)
    os.utime(path, ns=(1, 1))
    build(data, tmp_path / "out", *each)
    build(data, tmp_path / "fresh", *each)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    again = written_since(tmp_path / "out", old)
    assert "beton/00001.beton" in again and "beton/00000.beton" not in again and "labels/00000000.parquet" not in again


def test_an_added_shard_shifts_what_follows(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 3, 4)
    middle = data / "00000001.tar"
    shutil.move(middle, tmp_path / "kept.tar")
    build(data, tmp_path / "out")
    shutil.move(tmp_path / "kept.tar", middle)
    build(data, tmp_path / "out")
    build(data, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_shard_that_loses_its_last_row_loses_its_beton(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 3, 4)
    build(data, tmp_path / "out")
    (tmp_path / "out" / "beton" / "mine.beton").write_text("mine")
    write_tar(data / "00000000.tar", sample("x", None))
    for out in ("out", "fresh"):
        build(data, tmp_path / out, "--set", "build.max_bad_fraction=0.5")
    assert (tmp_path / "out" / "beton" / "mine.beton").read_text() == "mine"
    (tmp_path / "out" / "beton" / "mine.beton").unlink()
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_shard_that_is_no_longer_given_is_refused(built: Built) -> None:
    found = refused([built.data / "00000001.tar"], built.out)
    assert "holds label files of 1 shard not in the input, first 00000000" in found and "--overwrite" in found
    build([str(built.data / "00000001.tar")], built.out, "--overwrite")
    assert [beton.number for beton in read_manifest(built.out).betons] == [0]
    assert sorted(path.name for path in (built.out / "beton").iterdir()) == ["00000.beton"]
    assert sorted(path.name for path in (built.out / "done").glob("*/*.json")) == ["00000.json", "00000001.json"]


@pytest.mark.parametrize(
    ("option", "reported"),
    [
        ("labels.context=10", "labels.context was 75, is now 10"),
        ("labels.idf=paper", "labels.idf was 'smooth', is now 'paper'"),
        ("build.jpeg_quality=50", "images.jpeg_quality was 95, is now 50"),
    ],
)
def test_other_options_are_refused_until_overwrite(built: Built, tmp_path: Path, option: str, reported: str) -> None:
    before = contents(built.out)
    found = refused(built.data, built.out, "--set", option)
    assert reported in found and "begun with other options" in found and "--overwrite" in found
    assert contents(built.out) == before
    build(built.data, built.out, "--set", option, "--overwrite")
    build(built.data, tmp_path / "fresh", "--set", option)
    assert contents(built.out) == contents(tmp_path / "fresh")


def test_options_of_which_nothing_was_made_give_way(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("path,title\n" + "".join(f"{number}.jpg,a cat\n" for number in range(3)))
    assert "no column that build.caption_key names" in refused(
        table, tmp_path / "out", "--caption-key", "csv:titel", "--no-beton"
    )
    build(table, tmp_path / "out", "--caption-key", "csv:title", "--no-beton")
    assert "begun with other options" in refused(table, tmp_path / "out", "--caption-key", "csv:path", "--no-beton")


def test_overwrite_removes_only_what_was_built(built: Built) -> None:
    strays = ["notes.txt", "beton/mine.beton", "beton/1.beton", "labels/readme.md", "done/x.txt", "sub/manifest.json"]
    for name in strays:
        (built.out / name).parent.mkdir(exist_ok=True)
        (built.out / name).write_text("mine")
    (built.out / "labels" / "old.parquet.partial").write_text("half")
    build(built.data, built.out)
    build(built.data, built.out, "--overwrite", "--no-beton")
    assert all((built.out / name).read_text() == "mine" for name in strays)
    assert (
        not (built.out / "labels" / "old.parquet.partial").exists()
        and not (built.out / "beton" / "00000.beton").exists()
    )
    (built.out / "labels" / "mine.parquet").write_text("mine")
    assert "have to be moved away" in refused(built.data, built.out, "--overwrite")
    assert (built.out / "labels" / "mine.parquet").read_text() == "mine"


def test_a_half_written_file_is_never_taken_for_whole(built: Built) -> None:
    before = contents(built.out)
    for name in (
        "labels/00000000.parquet",
        "beton/00000.beton",
        "idf.parquet",
        "idf.duckdb",
        "manifest.json",
        "done/idf.json",
    ):
        shutil.move(built.out / name, built.out / f"{name}.partial")
    found = preprocess("verify", built.out)
    assert found.code == 2 and "has no manifest.json: the build is unfinished" in found.err
    build(built.data, built.out)
    assert contents(built.out) == before


def test_a_damaged_marker_counts_as_unfinished(built: Built) -> None:
    before = contents(built.out)
    for name in ("labels/00000000.json", "beton/00000.json", "idf.json", "options.json", "inputs.json"):
        (built.out / "done" / name).write_text("{")
    build(built.data, built.out)
    assert contents(built.out) == before


def test_an_old_marker_does_not_vouch_for_a_newer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built from A; from B, stopped between file and marker; then from A again: B's file must not pass for A's."""
    data = write_shards(tmp_path / "data", 1, 3)
    tar = data / "00000000.tar"
    original, times = tar.read_bytes(), tar.stat()
    build(data, tmp_path / "out", "--no-beton")
    before = contents(tmp_path / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    write_tar(tar, healthy(2, 70))
    with monkeypatch.context() as patched:
        patched.setattr(label_job, "write_marker", stop)
        assert preprocess("build-labels", data, "--out", tmp_path / "out", "--workers", 1).code != 0
    tar.write_bytes(original)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    build(data, tmp_path / "out", "--no-beton")
    assert contents(tmp_path / "out") == before


def test_a_second_writer_is_refused_with_the_first_ones_process(built: Built) -> None:
    with only_writer(built.out / ".lock"):
        found = refused(built.data, built.out)
    assert f"(host {socket.gethostname()}, process {os.getpid()})" in found and "another process is writing" in found
    build(built.data, built.out)


def test_rows_are_counted_in_file_name_order(tmp_path: Path) -> None:
    for name in ("a", "a-b", "a b", "a0", "B"):
        write_tar(tmp_path / "data" / f"{name}.tar", sample(f"key {name}"))
    build(tmp_path / "data", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "labels").iterdir())
    shards = read_manifest(tmp_path / "out").shards
    assert [f"{shard.name}.parquet" for shard in shards] == names
    assert [rows(tmp_path / "out")[shard.first_index]["key"] for shard in shards] == [
        f"key {shard.name}" for shard in shards
    ]
    assert preprocess("verify", tmp_path / "out").code == 0


def test_shards_in_several_folders_and_by_glob(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_shards(tmp_path / folder / "shards", 2, 1)
    build([tmp_path / "one", str(tmp_path / "two" / "*" / "00000001.tar")], tmp_path / "out", "--no-beton")
    assert [shard.name for shard in read_manifest(tmp_path / "out").shards] == [
        "one--shards--00000000",
        "one--shards--00000001",
        "two--shards--00000001",
    ]


def test_two_shards_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("a--b.tar", "a/b.tar"):
        write_tar(tmp_path / name, sample("0"))
    assert "would both be shard a--b" in refused(tmp_path, tmp_path / "out")


def test_urls(finished: Built, tmp_path: Path) -> None:
    build([f"file://{finished.data}"], tmp_path / "file")
    assert contents(tmp_path / "file") == contents(finished.out)
    memory = fsspec.filesystem("memory")
    for path in finished.data.iterdir():
        memory.pipe(f"/bucket/shards/{path.name}", path.read_bytes())
    build(["memory://bucket/shards"], tmp_path / "memory")
    assert rows(tmp_path / "memory") == rows(finished.out)
    assert (tmp_path / "memory/beton/00000.beton").read_bytes() == (finished.out / "beton/00000.beton").read_bytes()
    memory.pipe("/bucket/shards/00000001.tar", tar_bytes(healthy(1)))
    build(["memory://bucket/shards"], tmp_path / "memory")
    assert len(rows(tmp_path / "memory")) == 13


def test_relative_paths_of_data_and_output(finished: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished.data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    build(Path("data"), Path("some/out"))
    assert preprocess("verify", "some/out").out == "some/out: whole and unchanged\n"
    assert preprocess("sql", "some/out", "SELECT captions FROM corpus", "--format", "csv").out == "captions\n22\n"
    assert preprocess("idf", "some/out", "--out", "idf.parquet").code == 0
    assert Path("idf.parquet").read_bytes() == Path("some/out/idf.parquet").read_bytes()
