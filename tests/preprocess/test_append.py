"""`preprocess append`: new shards behind the old ones, which stay as they are; killed anywhere, never half taken for
whole.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from labels import storage
from labels.manifest import read_manifest
from shard_factory import Built, build, contents, healthy, preprocess, quarantined, rows, sample, write_tar

ONE_EACH = ("--set", "build.beton_samples=6")


def append(out: Path, *arguments: object) -> str:
    said = preprocess("append", out, *arguments, "--workers", 1)
    assert said.code == 0, said.err
    return said.out


def refused(out: Path, *arguments: object) -> str:
    said = preprocess("append", out, *arguments, "--workers", 1)
    assert said.code == 2, said.out
    return said.err[said.err.index("error: ") :]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Two shards of six samples and their label dataset; two more shards in `more`, the second with bad samples."""
    folder = tmp_path_factory.mktemp("append")
    for number in range(2):
        write_tar(folder / "data" / f"{number:08d}.tar", healthy(6, first=6 * number))
        bad = [*sample("bad", None), *sample("worse", "a cat", b"no image")] if number else []
        write_tar(folder / "more" / f"{number + 2:08d}.tar", [*healthy(4, first=12 + 4 * number), *bad])
    build(folder / "data", folder / "out", *ONE_EACH, "--set", "build.max_bad_fraction=0.2")
    return Built(folder / "data", folder / "out")


@pytest.fixture
def out(dataset: Built, tmp_path: Path) -> Path:
    shutil.copytree(dataset.out, tmp_path / "out")
    return tmp_path / "out"


def test_it_is_as_if_all_had_been_built_at_once(dataset: Built, out: Path, tmp_path: Path) -> None:
    old = {
        path: (path.stat().st_ino, path.read_bytes())
        for folder in ("beton", "labels")
        for path in (out / folder).iterdir()
    }
    more = dataset.data.parent / "more"
    assert "21 label rows from 4 shards" in append(out, more)
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in old} == old, "old files are the very same"
    both = tmp_path / "both"
    for tar in [*dataset.data.iterdir(), *more.iterdir()]:
        both.mkdir(exist_ok=True)
        shutil.copy(tar, both)
    build(both, tmp_path / "fresh", *ONE_EACH, "--set", "build.max_bad_fraction=0.2")
    expected = contents(tmp_path / "fresh")
    found = contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if not name.startswith("done/") and found[name] != expected[name]] == []
    assert quarantined(out) == [
        ("00000003", "bad", "labels", "no caption"),
        ("00000003", "worse", "images", "not an image"),
    ]
    assert preprocess("verify", out).code == 0


def test_a_second_run_does_nothing_and_a_damaged_file_is_written_again(dataset: Built, out: Path) -> None:
    append(out, dataset.data.parent / "more")
    before = contents(out)
    append(out, dataset.data.parent / "more", dataset.data)
    append(out)
    assert contents(out) == before
    for name in ("beton/00000.beton", "beton/00002.beton", "labels/00000003.parquet"):
        (out / name).write_bytes((out / name).read_bytes()[:-1])
        said = preprocess("verify", out)
        assert said.code == 1 and name in said.out and f"fix: run `preprocess append {out}`" in said.out
        append(out)
        assert contents(out) == before


def test_stopped_at_every_single_rename(dataset: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the old label dataset is complete, or there is no manifest; the same command then finishes."""
    more = dataset.data.parent / "more"
    shutil.copytree(dataset.out, tmp_path / "whole")
    append(tmp_path / "whole", more)
    old, expected = read_manifest(dataset.out), contents(tmp_path / "whole")
    for number in range(40):
        out, renames = tmp_path / f"stopped {number}", 0
        shutil.copytree(dataset.out, out)

        def replace(source: Any, target: Any, number: int = number) -> None:
            nonlocal renames
            renames += 1
            if renames > number:
                raise KeyboardInterrupt
            os.rename(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(storage.os, "replace", replace)
            if preprocess("append", out, more, "--workers", 1).code == 0:
                break
        if (out / "manifest.json").exists():
            assert read_manifest(out) == old
            for part in old.betons:
                assert (out / "beton" / f"{part.number:05d}.beton").read_bytes() == expected[
                    f"beton/{part.number:05d}.beton"
                ]
            assert (out / "idf.parquet").read_bytes() == (dataset.out / "idf.parquet").read_bytes()
        append(out, *([more] if number % 2 else []) if number else [more])
        assert contents(out) == expected, f"stopped after {number} renames"
    assert number > 10


def test_undo_gives_up_what_has_not_finished(dataset: Built, out: Path, tmp_path: Path) -> None:
    before = contents(out)
    write_tar(
        tmp_path / "bad" / "00000009.tar",
        [*healthy(1, 90), *(member for key in "abcdefgh" for member in sample(key, None))],
    )
    reported = refused(out, tmp_path / "bad")
    assert "8 of 21 samples are bad" in reported and "build.max_bad_fraction" in reported
    said = preprocess("verify", out)
    assert (
        said.code == 1
        and f"of an append that has not finished; `preprocess append {out}` resumes it, --undo removes it" in said.out
    )
    assert preprocess("append", out, "--undo").out == f"{out}: 1 shard removed\n"
    assert contents(out) == before and preprocess("verify", out).code == 0


def test_names_have_to_come_after_the_old_ones(dataset: Built, out: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "00000001.tar", healthy(3, 50))
    reported = refused(out, tmp_path / "data")
    assert (
        "would be shard 00000001, which this output folder has from" in reported and "add `--prefix more1-`" in reported
    )
    write_tar(tmp_path / "earlier" / "00000000_a.tar", healthy(3, 50))
    reported = refused(out, tmp_path / "earlier")
    assert "would be shard 00000000_a, before 00000001: old rows would lose their positions" in reported
    assert "names that come after 00000001" in reported
    append(out, tmp_path / "data", "--prefix", "more1-")
    assert [shard.name for shard in read_manifest(out).shards] == ["00000000", "00000001", "more1-00000001"]
    assert [row["key"] for row in rows(out)[12:]] == ["000000050", "000000051", "000000052"]
    assert "is not part of a file name" in refused(out, tmp_path / "data", "--prefix", "a/b")


def test_what_cannot_be_appended(dataset: Built, out: Path, tmp_path: Path) -> None:
    more = dataset.data.parent / "more"
    reported = refused(out, more, "--set", "labels.context=10")
    assert "labels.context was 75, is now 10" in reported and "begun with other options" in reported
    assert "images.jpeg_quality was 95, is now 50" in refused(out, more, "--set", "build.jpeg_quality=50")
    assert "does not exist" in refused(tmp_path / "none", more)
    (out / "manifest.json").unlink()
    assert "has no manifest.json: the build is unfinished" in refused(out, more)


def test_a_shard_that_changed_is_not_appended(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "data" / "0.tar", healthy(3))
    build(tmp_path / "data", tmp_path / "out")
    write_tar(tar, healthy(4))
    assert "has changed since it was built into this output folder as shard 0" in refused(
        tmp_path / "out", tmp_path / "data"
    )


def test_word_pairs_stay_those_that_were_chosen(tmp_path: Path) -> None:
    words = ("--set", "labels.ngrams=2", "--set", "labels.ngram_min_count=2")
    write_tar(tmp_path / "data" / "0.tar", [member for key in "abc" for member in sample(key, "red cat")])
    write_tar(tmp_path / "more" / "1.tar", [member for key in "defgh" for member in sample(key, "red cat on blue sea")])
    build(tmp_path / "data", tmp_path / "out", *words)
    pairs, old = (tmp_path / "out" / "pairs.parquet").read_bytes(), rows(tmp_path / "out")
    append(tmp_path / "out", tmp_path / "more")
    assert (tmp_path / "out" / "pairs.parquet").read_bytes() == pairs and rows(tmp_path / "out")[:3] == old
    assert set(old[0]["label_ids"]) <= set(rows(tmp_path / "out")[3]["label_ids"]), (
        "the pair is a class of the new rows too"
    )
    assert preprocess("verify", tmp_path / "out").code == 0
