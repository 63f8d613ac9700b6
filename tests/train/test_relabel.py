"""`train run --beton OUT --labels OTHER_OUT`: the betons of one build with the labels of another over the same rows."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beton_factory import photo, write_shards
from labels import beton
from labels.arrays import open_rows, rows_file, rows_folder, write_rows
from labels.config import load_pipeline
from labels.idf import read_idf
from labels.manifest import LABELS, ShardPart, read_manifest
from labels.storage import Layout, UserError, sha256_file
from loader_batches import batches, order_of
from shard_factory import build, sample, write_tar
from train.data.dataset import BetonSet
from train.data.files import allow_open_files
from train.data.open import make_rows, make_rows_once
from train.distributed import World
from train.trainer import train_run

COUNTS = [13, 5, 17]
SAMPLES = sum(COUNTS)
SHORT = "labels.context=2"
TINY = [
    "train.samples=20",
    "train.batch_size=4",
    "train.model.trunk=vit_tiny_patch16_224",
    "train.model.image_size=16",
    "train.model.trunk_args={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}",
    "train.data.threads=2",
    "train.optimizer.warmup_samples=4",
    "train.runtime.device=cpu",
    "train.runtime.precision=fp32",
    "train.runtime.threads=1",
    "train.checkpoint.every_samples=8",
    "train.log.tensorboard=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons in out/; the same rows with at most two labels in short/; with another IDF formula in paper/.

    One row has a broken image and is in no beton, and one shard has no row and no beton: neither the number of the
    sample nor of the beton gives the position of a row.
    """
    folder = tmp_path_factory.mktemp("relabel")
    shards = write_shards(folder / "shards", COUNTS)
    write_tar(shards / "00000000_a.tar", sample("000000500", b"\xff\xfe"))
    broken = [
        *sample("000000600", "a broken picture", b"no image"),
        *sample("000000601", "the picture after it", photo(601, 50, 40)),
    ]
    write_tar(shards / "00000000_b.tar", broken)
    build(shards, folder / "out", "--set", "build.beton_samples=17")
    build(shards, folder / "short", "--no-beton", "--set", SHORT)
    build(shards, folder / "paper", "--no-beton", "--set", "labels.idf=paper")
    return folder


@pytest.fixture
def short(folder: Path, tmp_path: Path) -> Path:
    """Labels of at most two tokens, in an output folder of their own without label arrays."""
    shutil.copytree(folder / "short", tmp_path / "short", ignore=shutil.ignore_patterns("rows"))
    return tmp_path / "short"


def make_all(out: Path, labels: Path) -> list[str]:
    return list(make_rows(out, labels))


def parquet_rows(out: Path) -> list[list[int]]:
    return [
        row
        for path in sorted((out / "labels").glob("*.parquet"))
        for row in pq.read_table(path)["label_ids"].to_pylist()
    ]


def edit(out: Path, shard: int, **values: object) -> None:
    """Change what the manifest says of one shard."""
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    manifest["shards"][shard] |= values
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_every_sample_has_the_other_labels_and_its_own_image(folder: Path, short: Path) -> None:
    out = folder / "out"
    assert make_all(out, short) == ["00000000", "00000000_b", "00000001", "00000002"]
    own, other = BetonSet(out), BetonSet(out, short)
    assert own.samples == other.samples == SAMPLES + 1 == 36
    assert (own.label_limit, other.label_limit, other.vocabulary) == (75, 2, 49_408)
    assert np.array_equal(other.idf, read_idf(Layout(short).idf_parquet))
    assert not np.array_equal(other.idf, own.idf)
    order, before, expected = order_of(other), parquet_rows(out), parquet_rows(short)
    assert sorted(order) == [row for row in range(SAMPLES + 2) if row != 13]
    found = batches(other)
    labels = torch.cat([label_ids for _, label_ids in found])
    assert labels.shape == (36, 2)
    for row, label_ids in zip(order, labels.tolist(), strict=True):
        assert [label for label in label_ids if label >= 0] == expected[row]
    assert sum(expected[row] != before[row] for row in order) > 30
    for (images, _), (same, _) in zip(found, batches(own), strict=True):
        assert torch.equal(images, same)
    for (images, label_ids), (same, also) in zip(found, batches(other, threads=1), strict=True):
        assert torch.equal(images, same)
        assert torch.equal(label_ids, also)


def test_labels_may_be_more_than_a_betons_rows_have_room_for(folder: Path, tmp_path: Path) -> None:
    out, long = folder / "out", tmp_path / "long"
    build(
        folder / "shards", long, "--no-beton", "--set", "labels.context=4000"
    )  # past the end of a beton, from its last label row
    make_all(out, long)
    own, other = BetonSet(out), BetonSet(out, long)
    assert (own.label_limit, other.label_limit) == (75, 4000)
    for (images, label_ids), (same, also) in zip(batches(other), batches(own), strict=True):
        assert torch.equal(images, same)
        assert torch.equal(label_ids[:, :75], also)
        assert (label_ids[:, 75:] < 0).all()


def test_where_only_the_idf_differs_the_betons_own_rows_serve(folder: Path) -> None:
    out, paper = folder / "out", folder / "paper"
    assert make_all(out, paper) == []
    assert not rows_folder(paper).exists()
    own, other = BetonSet(out), BetonSet(out, paper)
    assert not np.array_equal(own.idf, other.idf)
    assert np.array_equal(other.idf, read_idf(Layout(paper).idf_parquet))
    for (_, label_ids), (_, same) in zip(batches(own), batches(other), strict=True):
        assert torch.equal(label_ids, same)


@given(
    rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5, unique=True).map(sorted), min_size=1, max_size=40),
    group=st.integers(1, 50),
)
@settings(max_examples=30, deadline=None)
def test_an_array_is_the_label_file_padded(
    rows: list[list[int]], group: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("rows")
    part = write_label_file(out, rows, group)
    write_rows(out, part, 5)
    array = open_rows(out, part, 5)
    assert array is not None
    assert array.tolist() == [row + [-1] * (5 - len(row)) for row in rows]
    assert array.dtype == np.dtype("<i4")
    assert not array.flags.writeable


def write_label_file(out: Path, rows: Sequence[list[int]], group: int = 1000) -> ShardPart:
    """One label file of the contract's schema, and what a manifest says of it."""
    path = Layout(out).label_file("s")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [
        {"key": f"{at}", "uid": None, "width": 1, "height": 1, "token_ids": row[::-1], "label_ids": row}
        for at, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(values, LABELS), path, row_group_size=group)
    return ShardPart(
        name="s",
        source="s.tar",
        source_bytes=1,
        first_index=0,
        rows=len(rows),
        labels_sha256=sha256_file(path),
        keys_sha256="",
        quarantined={},
    )


def test_an_array_is_made_once_and_again_when_it_is_cut_or_of_other_labels(folder: Path, short: Path) -> None:
    out, manifest = folder / "out", read_manifest(short)
    make_all(out, short)
    arrays = sorted(rows_folder(short).iterdir())
    whole = {path: path.read_bytes() for path in arrays}
    stamps = {path: path.stat().st_ino for path in arrays}
    assert make_all(out, short) == []
    assert {path: path.stat().st_ino for path in arrays} == stamps

    path = rows_file(short, next(part for part in manifest.shards if part.name == "00000001"))
    for damaged in (whole[path][:-4], whole[path] + b"\0", whole[path][:40], b"", whole[arrays[0]]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"00000001-\w{16}\.npy is missing or incomplete(.|\n)*train run"):
            BetonSet(out, short)
        assert make_all(out, short) == ["00000001"]
        assert path.read_bytes() == whole[path]

    # The label file was built again: its old array is neither used nor kept; one of a shard with a longer name stays.
    table = pq.read_table(Layout(short).label_file("00000001"))
    pq.write_table(table, Layout(short).label_file("00000001"), compression="none")
    edit(short, 3, labels_sha256=sha256_file(Layout(short).label_file("00000001")))
    neighbour = path.with_name(f"00000001-{'a' * 16}-{'b' * 16}.npy")
    neighbour.write_bytes(b"")
    assert make_all(out, short) == ["00000001"]
    assert not path.exists()
    assert neighbour.exists()
    assert len(list(rows_folder(short).iterdir())) == len(arrays) + 1
    BetonSet(out, short)


def test_label_files_that_do_not_fit_their_manifest_are_named(folder: Path, short: Path, tmp_path: Path) -> None:
    out, path = folder / "out", Layout(short).label_file("00000002")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        UserError, match=r"00000002\.parquet changed since the build: SHA-256 \w{16}(.|\n)*preprocess verify"
    ):
        make_all(out, short)
    path.unlink()
    with pytest.raises(UserError, match=r"00000002\.parquet is missing"):
        make_all(out, short)
    part = write_label_file(tmp_path, [[1, 2, 3], [4]])
    with pytest.raises(UserError, match="a row holds 3 labels, more than the limit of 2"):
        write_rows(tmp_path, part, 2)
    with pytest.raises(UserError, match="it holds 2 rows, in the manifest 7"):
        write_rows(tmp_path, part.model_copy(update={"rows": 7}), 3)
    assert list(rows_folder(tmp_path).iterdir()) == []


def test_runs_started_together_make_the_same_arrays(folder: Path, short: Path) -> None:
    out = folder / "out"
    with ThreadPoolExecutor(4) as pool:
        for made in [pool.submit(make_all, out, short) for _ in range(4)]:
            made.result()
    assert [path.suffix for path in rows_folder(short).iterdir()] == [".npy"] * 4
    BetonSet(out, short)


def test_labels_of_other_rows_are_refused_with_both_values(folder: Path, short: Path, tmp_path: Path) -> None:
    out = folder / "out"
    edit(short, 3, keys_sha256="f" * 64)
    for attempt in (lambda: BetonSet(out, short), lambda: make_all(out, short)):
        with pytest.raises(UserError) as caught:
            attempt()
        text = str(caught.value)
        own = read_manifest(out).shards[3].keys_sha256[:16]
        assert f"00000001 with 5 rows, SHA-256 of the keys ffffffffffffffff... in {short}" in text
        assert f"00000001 with 5 rows, SHA-256 of the keys {own}... in {out}" in text
        assert f"preprocess build-labels DATA --out {short} --no-beton --overwrite" in text
    edit(short, 0, rows=12)
    with pytest.raises(UserError, match=r"00000000 with 12 rows(.|\n)*00000000 with 13 rows"):
        BetonSet(out, short)
    first = folder / "shards" / "00000000.tar"
    build(first, tmp_path / "labels", "--no-beton", "--set", SHORT)
    with pytest.raises(UserError, match=r"no further shard in \S+labels, 00000000_a with 0 rows"):
        BetonSet(out, tmp_path / "labels")
    keys = write_tar(
        tmp_path / "00000000.tar", [member for at in range(COUNTS[0]) for member in sample(f"{900 + at}", "a cat")]
    )
    build(keys, tmp_path / "keys", "--no-beton", "--set", SHORT)
    found, own = (read_manifest(one).shards[0].keys_sha256[:16] for one in (tmp_path / "keys", out))
    with pytest.raises(
        UserError, match=rf"00000000 with 13 rows, SHA-256 of the keys {found}(.|\n)*00000000 with 13 rows(.|\n)*{own}"
    ):
        BetonSet(out, tmp_path / "keys")
    build(first, tmp_path / "betons")
    with pytest.raises(UserError, match=r"00000000_a with 0 rows(.|\n)*no further shard in \S+betons"):
        BetonSet(tmp_path / "betons", folder / "short")


def test_a_label_beyond_the_head_names_the_array(folder: Path, short: Path) -> None:
    make_all(folder / "out", short)
    path = rows_file(short, read_manifest(short).shards[0])
    data = bytearray(path.read_bytes())
    data[-8:-4] = (49_408).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(
        UserError,
        match=rf"{path.name}, made for \S+00000\.beton, sample 12, has the label 49408(.|\n)*remove \S+{path.name}",
    ):
        batches(BetonSet(folder / "out", short))


@pytest.mark.parametrize("index", [37, -1, 2**62, 2**63 - 1])
def test_an_index_outside_all_shards_reads_nothing(folder: Path, short: Path, tmp_path: Path, index: int) -> None:
    make_all(folder / "out", short)
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    with open(out / "beton" / "00001.beton", "r+b") as file:
        file.seek(beton.METADATA_OFFSET + 2 * beton.METADATA.itemsize + beton.METADATA.fields["index"][1])  # type: ignore[index]
        file.write(index.to_bytes(8, "little", signed=True))
    with pytest.raises(
        UserError, match=rf"00001\.beton, sample 2 has the index {index}, which is no row of its shard(.|\n)*verify"
    ):
        batches(BetonSet(out, short))


def losses(run: Path) -> list[float]:
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def train(folder: Path, run: Path, labels: Path | None, *more: str) -> list[float]:
    assert train_run(folder / "out", run, load_pipeline(overrides=[*TINY, *more]), labels)
    return losses(run)


def test_training_uses_the_labels_reports_it_and_refuses_others_on_resume(
    folder: Path, short: Path, tmp_path: Path
) -> None:
    out = folder / "out"
    own, other = train(folder, tmp_path / "own", None), train(folder, tmp_path / "other", short)
    paper = train(folder, tmp_path / "paper", folder / "paper")
    assert len(own) == len(other) == len(paper) == 5
    assert own[0] != other[0]
    assert own[0] != paper[0]
    data = json.loads((tmp_path / "other" / "data.json").read_text())
    assert (data["beton"], data["labels"], data["label_limit"], data["samples"]) == (str(out), str(short), 2, 36)
    assert data["fingerprints"]["labels"] == read_manifest(short).fingerprint
    assert data["fingerprints"]["betons"] == read_manifest(out).fingerprint
    assert json.loads((tmp_path / "paper" / "data.json").read_text())["idf_formula"] == "paper"

    def refused(run: str, labels: Path | None) -> str:
        with pytest.raises(UserError) as caught:
            train_run(out, tmp_path / run, load_pipeline(overrides=[*TINY]), labels)
        return str(caught.value)

    marks = read_manifest(out).fingerprint, read_manifest(short).fingerprint
    assert f"other was trained with other labels: fingerprint {marks[1]}, {out} has {marks[0]}" in refused(
        "other", None
    )
    assert f"own was trained with other labels: fingerprint {marks[0]}, {short} has {marks[1]}" in refused("own", short)
    text = refused("own", folder / "paper")
    assert (
        f"own was trained with another IDF table: SHA-256 {read_manifest(out).idf_sha256[:16]}, {folder / 'paper'} has"
        in text
    )
    assert "give the --beton and --labels that the run was begun with" in text


def test_the_command_on_two_ranks_has_one_rank_make_the_arrays(folder: Path, short: Path, tmp_path: Path) -> None:
    reference = train(folder, tmp_path / "one", folder / "short")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [
        "-m",
        "train",
        "run",
        "--beton",
        str(folder / "out"),
        "--labels",
        str(short),
        "--out",
        str(tmp_path / "two"),
    ]
    overrides = [word for override in TINY for word in ("--set", override)]
    result = subprocess.run(
        [sys.executable, *launcher, *command, *overrides],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"label rows of {short}: 4 of 4 shards made") == 1
    assert f"labels of {short} (clip" in result.stdout
    assert np.allclose(losses(tmp_path / "two"), reference, rtol=1e-4)


class _Alone(World):
    """One rank of many, who hears only itself."""

    def any(self, *flags: bool) -> tuple[bool, ...]:
        return flags


def test_a_stop_while_arrays_are_made_keeps_what_is_done(
    folder: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = _Alone(0, 1, torch.device("cpu"))
    assert not make_rows_once(folder / "out", short, world, lambda: True)
    assert len(list(rows_folder(short).iterdir())) == 1
    assert len(make_all(folder / "out", short)) == 3
    # A node's first rank finds nothing to do where the disk is shared, and makes what its own disk lacks.
    (rows_folder(short) / rows_file(short, read_manifest(short).shards[0]).name).unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert make_rows_once(folder / "out", short, _Alone(9, 1, torch.device("cpu")), lambda: False)
    assert len(list(rows_folder(short).iterdir())) == 3
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert make_rows_once(folder / "out", short, _Alone(8, 1, torch.device("cpu")), lambda: False)
    assert len(list(rows_folder(short).iterdir())) == 4


def test_the_limit_of_open_files_is_raised_or_the_fix_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    allow_open_files(100)
    assert asked == []
    allow_open_files(2000)
    assert asked == [(2512, 4096)]
    with pytest.raises(UserError, match="9000 files to hold open, the system allows this process 4096"):
        allow_open_files(9000)
