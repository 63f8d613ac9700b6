"""`preprocess plan`: what it foretells in bytes is what a build then writes; the arithmetic of time; what it says of itself."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_factory import build, preprocess, write_shards

from labels.config import load_pipeline
from labels.told import time_told
from preprocess.estimate import choose_shards
from preprocess.forecast import Measured, forecast, makespan
from preprocess.inputs.shards import Shard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("plan") / "data", 4, 12)


def test_disk_and_rows_are_those_of_the_build(data: Path, tmp_path: Path) -> None:
    said = preprocess("plan", data, "--out", tmp_path / "out", "--workers", 1, "--price-per-hour", 3600, "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert list(tmp_path.iterdir()) == []
    build(data, tmp_path / "out")
    for stage, folders in (("labels", ("labels", "counts")), ("betons", ("beton",))):
        written = sum(path.stat().st_size for folder in folders for path in (tmp_path / "out" / folder).iterdir())
        assert told["disk_bytes"][stage] == pytest.approx(written, rel=0.05)
    assert told["rows"] == pytest.approx(48, rel=0.05)
    assert told["shards"] == 4 and len(told["measured"]) == 3
    assert told["costs"]["build"] == pytest.approx(told["total_seconds"])


def test_for_people_with_every_assumption(data: Path, tmp_path: Path) -> None:
    said = preprocess("plan", data, "--out", tmp_path, "--workers", 1, "--samples", "1.2M", "--no-beton", "--price-per-gib-month", 5)
    assert said.code == 0, said.err
    for told in (
        "about 1,200,000 label rows",
        "cost of the storage a month",
        "1,200,000 samples lie in shards of the size",
        "build.duckdb_memory",
    ):
        assert told in " ".join(said.out.split()), told
    assert "betons" not in said.out


def test_samples_that_are_no_number(data: Path) -> None:
    assert "'many'; allowed: a number of samples" in preprocess("plan", data, "--samples", "many").err


def shard(number: int, size: int) -> Shard:
    return Shard(f"{number:08d}", f"{number}.tar", size, "")


def test_the_measured_are_middling_and_from_everywhere() -> None:
    shards = [shard(number, size) for number, size in enumerate([5, 1, 9, 7, 7, 2, 8, 3, 3])]
    assert [one.name for one in choose_shards(shards, 3)] == ["00000000", "00000003", "00000008"]
    assert len(choose_shards(shards[:1], 3)) == 1


def measured(**changed: float) -> Measured:
    seconds = {"start_s": 1.0, "tokenizer_s": 0.125, "read_warm_s": 0.5, "label_warm_s": 0.25, "label_s": 2.0, "idf_s": 3.0, "beton_s": 4.0}
    counts = {"source_bytes": 100, "vocabulary": 10, "rows": 10, "samples": 10, "left_out": 0}
    sizes = {"label_bytes": 7, "table_bytes": 11, "beton_bytes": 90, "head_bytes": 0, "peak_bytes": 1 << 20}
    values = {"name": "0", **seconds, **counts, **sizes}
    return Measured(**{**values, **changed})  # type: ignore[arg-type]


def test_stages_add_up() -> None:
    shards = [shard(number, 100) for number in range(4)]
    found = forecast(
        shards, [measured(), measured()], load_pipeline(), Path("out"), workers=2, samples=None, betons=True, summing=0.1, stop_s=0.5
    )
    assert found.seconds == pytest.approx({"start and end": 1.625, "labels": 2.375 + 4.0, "idf": 3.4, "betons": 2.0 + 8.0})
    assert found.disk_bytes == {"labels": 28, "idf": 11, "betons": 360}
    assert (found.rows, found.spread, found.memory_bytes) == (40, 0.0, 3 * 2**20 + 2**30)
    more = forecast(shards, [measured()], load_pipeline(), Path("out"), workers=2, samples=400, betons=True, summing=0.1, stop_s=0.5)
    assert more.shards == 40 and more.seconds["betons"] == pytest.approx(2.0 + 80)


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_makespan_is_between_its_bounds(times: list[float], workers: int) -> None:
    found = makespan(times, workers)
    assert max(max(times), sum(times) / workers) - 1e-6 <= found <= sum(times) / workers + max(times) + 1e-6


def test_times_are_told_in_fitting_units() -> None:
    assert [time_told(value) for value in (7.84, 600, 36_000)] == ["7.8 s", "10.0 min", "10.0 h"]
