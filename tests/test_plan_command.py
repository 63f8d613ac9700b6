"""`preprocess plan`: what it foretells in bytes is what a build then writes; the arithmetic of time; what it says of itself."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_factory import build, preprocess, write_shards

from labels.config import load_pipeline
from labels.html import format_seconds
from preprocess import estimate
from preprocess.forecast import Forecast, forecast, makespan
from preprocess.inputs.shards import Shard
from preprocess.measured import Built, Measured, Pass, Ran, Work, Written
from preprocess.trial import choose_shards, foretold_groups


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


def ran(first: float, *again: float, began: float = 0.0, compiled: bool = False) -> Ran:
    """A process whose tasks took so many seconds, each for 100 bytes."""
    return Ran(began, 9.0, Work(first, 100), [Work(seconds, 100) for seconds in again], peak_bytes=1 << 20, compiled=compiled)


def measured(shards: int, groups: int, **changed: Any) -> Measured:
    """Of shards of 100 bytes two were built, in two processes: labels take 2 s each, betons 4 s."""
    built = Built(["0", "1"], source_bytes=200, rows=20, left_out=0, label_bytes=14, table_bytes=11)
    written = Written(source_bytes=400, samples=40, left_out=0, bytes=360, head_bytes=0, files=2)
    labels, betons = Pass([ran(2.5, 2.0), ran(3.0, 2.0)], open_s=0.5), Pass([ran(4.5, 4.0), ran(4.5, 4.0)], open_s=0.25)
    sizes = [shards * 100 // groups] * groups
    values = {"built": built, "written": written, "labels": labels, "betons": betons, "idf_s": 3.0, "summing_s": 0.1, "work_s": 0.0}
    return Measured(**{"shards": [100] * shards, "groups": sizes, **values, **changed})


def foretold(found: Measured, workers: int = 2, samples: int | None = None) -> Forecast:
    return forecast(found, load_pipeline(), Path("out"), workers=workers, samples=samples, start_s=1.5)


def test_stages_add_up() -> None:
    found = foretold(measured(4, 4))
    # Two of four shards for each worker; the opening of the label pass is in the start, that of the betons is not.
    assert found.seconds == pytest.approx({"start and end": 1.5, "labels": 0.75 + 4.0, "idf": 3.2, "betons": 0.25 + 0.5 + 8.0})
    assert found.disk_bytes == {"labels": 28, "idf": 11, "betons": 360}
    assert (found.rows, found.spread, found.memory_bytes) == (40, 0.0, 3 * 2**20 + 2**30)
    more = foretold(measured(4, 4), samples=400)
    assert more.shards == 40 and more.seconds["betons"] == pytest.approx(0.75 + 80)


def test_one_group_is_written_by_one_process() -> None:
    assert foretold(measured(4, 1)).seconds["betons"] == pytest.approx(0.75 + 16.0)


def test_a_build_without_betons() -> None:
    found = foretold(measured(4, 4, betons=None, written=None), workers=1)
    assert list(found.seconds) == ["start and end", "labels", "idf"] and list(found.disk_bytes) == ["labels", "idf"]
    assert found.seconds["labels"] == pytest.approx(0.75 + 8.0) and found.memory_bytes == 2**20 + 2**30


def test_speeds_that_differ() -> None:
    uneven = Pass([ran(2.0, 1.0), ran(4.0, 3.0)], open_s=0.0)  # of 2 s a task, the one half, the other once and a half as long
    assert (uneven.per_byte, uneven.warm_s, uneven.spread) == pytest.approx((0.02, 1.0, 0.5))
    assert Pass([ran(1.0, 2.0)], open_s=0.0).warm_s == 0.0
    found = foretold(measured(4, 4, labels=uneven))
    labels, betons = found.seconds["labels"], found.seconds["betons"]
    assert found.spread == pytest.approx(0.5 * labels / (labels + betons))


def test_small_shards_make_one_group_and_large_ones_many() -> None:
    shards = [shard(number, 1000) for number in range(8)]
    assert foretold_groups(shards, 1.0, load_pipeline()) == [8000]
    assert foretold_groups(shards, 4.0, load_pipeline()) == [2000] * 4
    assert foretold_groups(shards, 40.0, load_pipeline()) == [1000] * 8


def test_a_rehearsal_that_compiled_is_done_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cold, warm = measured(4, 4, labels=Pass([ran(9.0, 2.0, compiled=True)], 0.0), work_s=30.0), measured(4, 4, work_s=5.0)
    for rounds, told in (
        ([(cold, 50.0), (warm, 7.0)], "note: code was compiled first, which took 43.0 s"),
        ([(warm, 7.0)], ""),
        ([(cold, 50.0), (cold, 32.0)], ""),  # nothing is kept: every build compiles
    ):
        left = list(rounds)
        monkeypatch.setattr(estimate, "_rehearsed", lambda *_, left=left: left.pop(0))
        found = estimate.estimate([], Path("out"), load_pipeline(), samples=None, betons=True)
        assert not left and found.seconds["start and end"] == 2.0
        assert told in (said := capsys.readouterr().err) and bool(said) == bool(told)


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_of_a_rehearsal_know_whether_they_compiled(data: Path, tmp_path: Path, workers: int) -> None:
    """The first one here may compile, the second finds all code kept; each task of a pass is measured."""
    settings = load_pipeline(overrides=[f"build.workers={workers}"])
    for number in range(2):
        found, seconds = estimate._rehearsed([str(data)], tmp_path / str(number), settings, workers, None, True)
    assert not found.compiled and 0 < found.work_s < seconds
    assert found.betons is not None and (len(found.labels.ran), len(found.betons.ran)) == (workers, 1)
    assert len(found.labels.ran[0].again) == len(found.built.names) - 1 == (2 if workers == 1 else 1)
    assert found.groups == [sum(found.shards)] == [work.bytes for work in found.betons.ran[0].again] and (found.labels.open_s > 0) == (
        workers == 2
    )


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_makespan_is_between_its_bounds(times: list[float], workers: int) -> None:
    found = makespan(times, workers)
    assert max(max(times), sum(times) / workers) - 1e-6 <= found <= sum(times) / workers + max(times) + 1e-6


def test_times_are_told_in_fitting_units() -> None:
    assert [format_seconds(value) for value in (7.84, 600, 36_000)] == ["7.8 s", "10.0 min", "10.0 h"]
