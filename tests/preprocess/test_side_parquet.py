"""Captions from the Parquet next to a tar, checked against the tar when the betons are written."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shard_factory import build, sample, tar_bytes

KEYS = [f"{number:04d}" for number in range(6)]
LIMIT = "build.max_bad_fraction=0.9"


def left_out(folder: Path, tar: bytes) -> dict[str, tuple[str, str]]:
    """Key -> reason and detail, of a shard whose side Parquet has all six keys, each with its own caption."""
    data = folder / "data"
    data.mkdir()
    (data / "a.tar").write_bytes(tar)
    pq.write_table(pa.table({"key": KEYS, "caption": [f"picture {key}" for key in KEYS]}), data / "a.parquet")
    build(data, folder / "out", "--set", LIMIT)
    return {
        row["key"]: (row["reason"], row["detail"])
        for row in pq.read_table(folder / "out" / "quarantine.parquet").to_pylist()
    }


def members(*keys: str) -> list[tuple[str, bytes]]:
    return [member for key in keys for member in sample(key, f"picture {key}")]


def test_a_whole_tar_has_all_of_them(tmp_path: Path) -> None:
    assert left_out(tmp_path, tar_bytes(members(*KEYS))) == {}


def test_missing_and_different_samples_are_reported(tmp_path: Path) -> None:
    tar = tar_bytes([*members(*KEYS[:3]), *sample(KEYS[3], "another picture"), *members(KEYS[5])])
    assert left_out(tmp_path, tar) == {
        KEYS[3]: ("caption differs", "the tar's txt is not the side Parquet's caption"),
        KEYS[4]: ("not in the tar", "the side Parquet has it"),
    }


def test_a_cut_tar_is_reported_as_one(tmp_path: Path) -> None:
    """Not as one that never had the samples: it has to be downloaded again."""
    tar = tar_bytes(members(*KEYS))
    cut = tar.index(KEYS[3].encode() + b".") + 700  # within the first member of the fourth sample
    found = left_out(tmp_path, tar[:cut])
    assert list(found) == KEYS[3:]
    assert {reason for reason, _ in found.values()} == {"tar cut or damaged"}
    assert all(detail.startswith(f"{KEYS[3]}.") and detail.endswith(f"of {cut}") for _, detail in found.values())
