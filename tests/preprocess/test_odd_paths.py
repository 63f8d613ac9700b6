"""Whole builds with odd names of DATA, shards and the output folder: built, verified, and resumed without any work."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labels.manifest import read_manifest, read_sources
from labels.storage import Layout, atomic_write, library_path, user_path
from shard_factory import build, healthy, jpeg, preprocess, refused, rows, write_tar

LATIN_1 = "caf\udce9"


def small_table(folder: Path, *names: str) -> Path:
    """p.csv that names these images, with their files; its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))
    lines = [os.fsencode(name) + b",a red cat" for name in names]
    (folder / "p.csv").write_bytes(b"\n".join([b"path,caption", *lines, b""]))
    return folder


def times(out: Path) -> dict[str, int]:
    """When each label file and beton was written."""
    return {str(path): path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".parquet", ".beton")}


def check_again(data: str, out: str) -> None:
    """The same command again has nothing to do, and verify finds the folder whole."""
    before = times(user_path(out))
    again = preprocess("build-labels", data, "--out", out, "--workers", 1)
    assert again.code == 0, again.err
    kept = {name: time for name, time in times(user_path(out)).items() if "quarantine" not in name}
    assert kept.items() <= before.items()
    verified = preprocess("verify", out)
    assert verified.code == 0, verified.out


@pytest.mark.parametrize("out", ["run:1", "o::4", f"{LATIN_1}/{LATIN_1}", "~/o", "it's, ä b", "a[1]*/x"])
def test_odd_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_tar(tmp_path / "data/0.tar", healthy(3))
    build(["data"], Path(out))
    assert not os.path.lexists("~") and len(rows(user_path(out))) == 3
    check_again("data", out)
    for command in (
        ["sql", out, "FROM labels"],
        ["explain", out, "000000001"],
        ["idf", out, "--out", f"{LATIN_1}.parquet"],
    ):
        said = preprocess(*command)
        assert said.code == 0, said.err
    said = preprocess("report", out, "--out", "r:1.html")
    assert said.code == 0 and Path("r:1.html").is_file(), said.err
    assert preprocess("idf", out, "--recount", "--out", "i.parquet").code == 0


@pytest.mark.parametrize(
    "options", [[], ["--no-images"], ["--set", "labels.ngrams=2", "--set", "labels.ngram_min_count=1"]]
)
def test_shards_of_odd_names(tmp_path: Path, options: list[str]) -> None:
    deep = "/".join(["d" * 60] * 5)
    names = ["0", LATIN_1, f"{LATIN_1}.d/1", "x::1", "a[1]", "a1", "star*", "starX", "back\\slash", "q'q", f"{deep}/2"]
    for number, name in enumerate(names):
        write_tar(tmp_path / "data" / f"{name}.tar", healthy(2, first=2 * number))
    out = tmp_path / "out"
    build(tmp_path / "data", out, *options)
    assert sorted(row["key"] for row in rows(out)) == [f"{number:09d}" for number in range(2 * len(names))]
    check_again(str(tmp_path / "data"), str(out)) if not options else None
    manifest = read_manifest(out)
    frequency = np.sum(pq.read_table(out / "idf.parquet")["document_frequency"].to_numpy())
    assert frequency == sum(len(row["label_ids"]) for row in rows(out)), "each shard's counts once"
    assert manifest.samples == 2 * len(names) and preprocess("verify", out).code == 0
    assert preprocess("explain", out, "000000003", "--html", tmp_path / "e.html").code == 0
    if "--no-images" in options:
        assert {source.path for source in read_sources(Layout(out)).values()} == {
            f"{tmp_path}/data/{name}.tar" for name in names
        }


def test_explain_finds_a_shard_whose_name_is_not_utf8(tmp_path: Path) -> None:
    write_tar(tmp_path / f"{LATIN_1}.tar", healthy(2))
    build(tmp_path, tmp_path / "out")
    said = preprocess("explain", tmp_path / "out", "000000001")
    assert said.code == 0 and "from the shard" in said.out, said.out


def test_images_of_a_table_by_odd_names(tmp_path: Path) -> None:
    small_table(
        tmp_path / f"{LATIN_1}::d", "a.jpg", "Art::Deco.jpg", "data:v1.jpg", "run:1.jpg", f"{LATIN_1}.jpg", "a?.jpg"
    )
    build(tmp_path / f"{LATIN_1}::d", tmp_path / "out")
    assert read_manifest(tmp_path / "out").samples == 6


@pytest.mark.parametrize("out", ["out", ".", "deep/er"])
def test_the_output_folder_may_be_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    data = small_table(tmp_path / "data", "a.jpg", "b.jpg")
    pq.write_table(pa.table({"image": [jpeg(5)], "caption": ["a dog"]}), data / "more.parquet")
    monkeypatch.chdir(data)
    for _ in range(3):
        build(["."], Path(out))
        assert len(rows(Path(out))) == 3
    build([f"{data}/*.csv", f"{data}/**/*.parquet"], Path(out))
    build(["."], tmp_path / "other")
    build(["."], Path("second"))
    assert len(rows(tmp_path / "other")) == len(rows(Path("second"))) == 3


def test_path_keys_of_the_configuration_know_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_tar(tmp_path / "home/data/0.tar", healthy(4))
    (tmp_path / "home/metadata").mkdir()
    scores = {"uid": [f"{number:032x}" for number in range(4)], "score": [0.1, 0.9, 0.9, 0.1]}
    pq.write_table(pa.table(scores), tmp_path / "home/metadata/m.parquet")
    pq.write_table(pa.table({"uid": scores["uid"][:1]}), tmp_path / "home/chosen.parquet")
    (tmp_path / "home/p.yaml").write_text(json.dumps({"paths": {"out": "~/o"}, "build": {"metadata": "~/metadata"}}))
    for options, count in ((["score > 0.5"], 2), (["~/chosen.parquet", "--overwrite"], 1)):
        said = preprocess("build-labels", "~/data", "--config", "~/p.yaml", "--workers", 1, "--subset", *options)
        assert said.code == 0 and len(rows(tmp_path / "home/o")) == count, said.err
    assert preprocess("idf", "~/o", "--out", "~/i.parquet").code == 0 and (tmp_path / "home/i.parquet").is_file()
    assert not os.path.lexists("~")


def test_metadata_and_subsets_of_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uids = [f"{number:032x}" for number in range(4)]
    write_tar(tmp_path / "data/0.tar", healthy(4))
    for number, name in enumerate(("m:1", "m::2", LATIN_1)):
        Path(name).mkdir()
        pq.write_table(pa.table({"uid": uids, "score": [0, 1, 1, 1]}), library_path(tmp_path / name) / "m.parquet")
        subset, out = "score = 1", f"out{number}"
        build(["data"], Path(out), "--set", f"build.metadata={json.dumps(name)}", "--subset", subset)
        assert len(rows(Path(out))) == 3
    for name in ("s:1.parquet", f"{LATIN_1}/s.parquet", f"{LATIN_1}.parquet"):
        with atomic_write(user_path(name)) as partial:
            pq.write_table(pa.table({"uid": uids[:2]}), partial)
        build(["data"], Path("chosen"), "--subset", name, "--overwrite")
        assert len(rows(Path("chosen"))) == 2 and preprocess("verify", "chosen").code == 0


@pytest.mark.parametrize(
    ("out", "problem"),
    [("o" * 256, "too long for a file"), ("", "is no path"), ("/proc/x", "cannot be made"), ("/dev/null", "is a file")],
)
def test_output_folders_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "data/0.tar", healthy(1))
    said = preprocess("build-labels", "data", "--out", out, "--workers", 1)
    assert said.code == 2 and problem in said.err and "fix: " in said.err
    assert "does not exist" in refused(["data/0.tar::data/1.tar"], Path("o"))
