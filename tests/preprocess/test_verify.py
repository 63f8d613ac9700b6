"""`preprocess verify`: every damage is found and named, and the build command fixes it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labels.manifest import Manifest, read_manifest, write_manifest
from labels.storage import Layout, sha256_file
from shard_factory import Built, build, contents, flip_bit, preprocess, write_shards

FILES = [
    "labels/00000000.parquet",
    "labels/00000001.parquet",
    "idf.parquet",
    "idf.duckdb",
    "beton/00000.beton",
    "quarantine.parquet",
]


def assert_found_and_fixed(built: Built, name: str, before: dict[str, object]) -> str:
    said = preprocess("verify", built.out)
    assert said.code == 1 and "fix: run the build-labels command of this folder again" in said.out
    faults = said.out.splitlines()[:-1]
    assert faults and all(str(built.out / name) in fault for fault in faults), said.out
    build(built.data, built.out)
    assert contents(built.out) == before
    assert preprocess("verify", built.out).out == f"{built.out}: whole and unchanged\n"
    return said.out


def test_a_whole_out_passes(finished: Built) -> None:
    said = preprocess("verify", finished.out)
    assert (said.code, said.out) == (0, f"{finished.out}: whole and unchanged\n")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_one_flipped_bit(built: Built, name: str, share: float) -> None:
    before = contents(built.out)
    flip_bit(built.out / name, share)
    assert_found_and_fixed(built, name, before)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file(built: Built, name: str) -> None:
    before = contents(built.out)
    data = (built.out / name).read_bytes()
    (built.out / name).write_bytes(data[: len(data) // 2])
    assert_found_and_fixed(built, name, before)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(built: Built, name: str) -> None:
    before = contents(built.out)
    (built.out / name).unlink()
    assert "missing" in assert_found_and_fixed(built, name, before)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE tokens SET document_frequency = document_frequency + 1 WHERE token_id = 320",
        "UPDATE corpus SET captions = 1",
        "UPDATE shards SET rows = 1 WHERE shard = '00000001'",
        "DELETE FROM shards",
        "DROP TABLE corpus",
    ],
)
def test_changed_tables_in_the_duckdb_file(built: Built, change: str) -> None:
    before = contents(built.out)
    with duckdb.connect(str(built.out / "idf.duckdb")) as con:
        con.execute(change)
    assert_found_and_fixed(built, "idf.duckdb", before)


def test_a_file_that_does_not_belong(built: Built) -> None:
    stray = built.out / "labels" / "mine.parquet"
    shutil.copy(built.out / "labels" / "00000000.parquet", stray)
    said = preprocess("verify", built.out)
    assert said.code == 1 and f"{stray}: not of this build; move it away" in said.out
    stray.unlink()
    assert preprocess("verify", built.out).code == 0


def test_all_faults_are_reported(built: Built) -> None:
    flip_bit(built.out / "labels" / "00000000.parquet")
    (built.out / "beton" / "00000.beton").unlink()
    (built.out / "quarantine.parquet").unlink()
    said = preprocess("verify", built.out)
    assert said.out.splitlines()[-1].startswith(f"{built.out}: 3 faults")
    assert "00000000.parquet: changed since the build (SHA-256" in said.out and "00000.beton: missing" in said.out


def _with(manifest: Manifest, out: Path, **changes: object) -> None:
    write_manifest(Layout(out), manifest.model_copy(update=changes))


def _unsorted(out: Path) -> None:
    """Label rows in another order, and a manifest that vouches for them."""
    path = out / "labels" / "00000000.parquet"
    table = pq.read_table(path)
    position = table.schema.get_field_index("label_ids")
    turned = [row[::-1] for row in table["label_ids"].to_pylist()]
    schema = table.schema
    pq.write_table(
        table.set_column(position, schema.field(position), pa.array(turned, schema.field(position).type)), path
    )
    manifest = read_manifest(out)
    shards = [manifest.shards[0].model_copy(update={"labels_sha256": sha256_file(path)}), *manifest.shards[1:]]
    _with(manifest, out, shards=shards)


def _other_beton(out: Path) -> None:
    """A beton of another build, vouched for."""
    manifest = read_manifest(out)
    betons = [manifest.betons[0].model_copy(update={"shards": ["00000001"]}), *manifest.betons[1:]]
    _with(manifest, out, betons=betons)


def _other_formula(out: Path) -> None:
    _with(read_manifest(out), out, idf_formula="paper")


def _other_count(out: Path) -> None:
    manifest = read_manifest(out)
    _with(manifest, out, shards=[manifest.shards[0].model_copy(update={"rows": 11}), *manifest.shards[1:]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unsorted, "00000000.parquet: a row's label ids are not sorted and unique"),
        (_other_beton, "00000.beton: its indices are not rising rows of shard 00000001"),
        (_other_formula, "idf.parquet: its idf column does not follow from its document frequencies"),
        (_other_count, "00000000.parquet: 12 rows, in the manifest 11"),
    ],
)
def test_parts_that_do_not_fit_each_other(built: Built, spoil: Callable[[Path], None], message: str) -> None:
    spoil(built.out)
    said = preprocess("verify", built.out)
    assert said.code == 1 and message in said.out


def test_labels_without_betons_can_be_verified(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", 2, 3)
    build(data, tmp_path / "out", "--no-beton")
    assert preprocess("verify", tmp_path / "out").code == 0
    flip_bit(tmp_path / "out" / "labels" / "00000001.parquet")
    assert preprocess("verify", tmp_path / "out").code == 1


def test_no_out_is_an_error(tmp_path: Path) -> None:
    said = preprocess("verify", tmp_path / "none")
    assert said.code == 2 and "does not exist" in said.err
