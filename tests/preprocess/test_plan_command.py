"""`preprocess plan`: its disk and rows are those of the build; the arithmetic of time; what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labels.config import load_pipeline
from labels.html import format_seconds
from labels.manifest import ShardPart
from preprocess import estimate as module
from preprocess.betons.plan import Member
from preprocess.estimate import Estimate, Pass, Sample, choose_shards, elapsed, extrapolate, group_shards, measure
from preprocess.readers.shards import Shard
from shard_factory import build, preprocess, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("plan") / "data", 4, 12)


def test_disk_and_rows_are_those_of_the_build(data: Path, tmp_path: Path) -> None:
    said = preprocess("plan", data, "--out", tmp_path / "out", "--workers", 1, "--price-per-hour", 3600, "--json")
    assert said.code == 0, said.err
    reported = json.loads(said.out)
    assert list(tmp_path.iterdir()) == []
    build(data, tmp_path / "out")
    for stage, folders in (("labels", ("labels", "counts")), ("betons", ("beton",))):
        written = sum(path.stat().st_size for folder in folders for path in (tmp_path / "out" / folder).iterdir())
        assert reported["disk_bytes"][stage] == pytest.approx(written, rel=0.05)
    assert reported["rows"] == pytest.approx(48, rel=0.05)
    assert reported["shards"] == 4 and len(reported["measured"]) == 3
    assert reported["costs"]["build"] == pytest.approx(reported["total_seconds"])


def test_for_people_with_every_assumption(data: Path, tmp_path: Path) -> None:
    said = preprocess(
        "plan", data, "--out", tmp_path, "--workers", 1, "--samples", "1.2M", "--no-beton", "--price-per-gib-month", 5
    )
    assert said.code == 0, said.err
    for reported in (
        "about 1,200,000 label rows",
        "cost of the storage a month",
        "1,200,000 samples are in shards of the size",
        "build.duckdb_memory",
    ):
        assert reported in " ".join(said.out.split()), reported
    assert "betons" not in said.out


def test_samples_that_are_no_number(data: Path) -> None:
    assert "'many'; allowed: a number of samples" in preprocess("plan", data, "--samples", "many").err


def shard(number: int, size: int) -> Shard:
    return Shard(f"{number:08d}", f"{number}.tar", size, "")


def test_measured_shards_are_of_medium_size_and_from_everywhere() -> None:
    shards = [shard(number, size) for number, size in enumerate([5, 1, 9, 7, 7, 2, 8, 3, 3])]
    assert [one.name for one in choose_shards(shards, 3)] == ["00000000", "00000003", "00000008"]
    assert len(choose_shards(shards[:1], 3)) == 1


def measured(shards: int, **changed: Any) -> Sample:
    """Of shards of 100 bytes two were built, in two processes: labels take 2 s each, betons 4 s."""
    labels, betons = (Pass(2, seconds, spread=0.0, work_s=0.0, peak_bytes=1 << 20) for seconds in (0.02, 0.04))
    values = {
        "rows": 20,
        "rejected": 0,
        "label_bytes": 14,
        "table_bytes": 11,
        "idf_s": 3.0,
        "idf_shard_s": 0.1,
        "start_s": 1.5,
    }
    passes = {"labels": labels, "betons": betons, "beton_bytes": 0.9}
    return Sample(**{"shards": [100] * shards, "names": ["0", "1"], "source_bytes": 200, **values, **passes, **changed})


def estimated(sample: Sample, workers: int = 2, samples: int | None = None) -> Estimate:
    return extrapolate(sample, load_pipeline(), workers=workers, samples=samples, free_bytes=None)


def test_stages_add_up() -> None:
    found = estimated(measured(4))
    assert found.seconds == pytest.approx({"start and end": 1.5, "labels": 4.0, "idf": 3.2, "betons": 8.0})
    assert found.disk_bytes == {"labels": 28, "idf": 11, "betons": 360}
    assert (found.rows, found.spread, found.memory_bytes) == (40, 0.0, 3 * 2**20 + 2**30)
    more = estimated(measured(4), samples=400)
    assert more.shards == 40 and more.seconds["betons"] == pytest.approx(80)
    assert more.disk_bytes == {"labels": 280, "idf": 11, "betons": 3600}


def test_one_group_is_written_by_one_process() -> None:
    assert estimated(measured(4, group_shards=4)).seconds["betons"] == pytest.approx(16.0)


def test_a_build_without_betons() -> None:
    found = estimated(measured(4, betons=None), workers=1)
    assert list(found.seconds) == ["start and end", "labels", "idf"] and list(found.disk_bytes) == ["labels", "idf"]
    assert found.seconds["labels"] == pytest.approx(8.0) and found.memory_bytes == 2**20 + 2**30


def test_speeds_that_differ() -> None:
    def timed(function: object, tasks: list[Any], workers: int) -> Any:
        return [([(first, 100), (again, 100)], 7, [again]) for first, again in ((2.0, 1.0), (4.0, 3.0))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_tasks", timed)
        uneven, markers = module._time_pass(
            len, [[], []]
        )  # a task takes 2 s, the one half as long, the other one and a half times
    assert uneven._replace(spread=0.0) == Pass(2, 0.02, spread=0.0, work_s=4.0, peak_bytes=7) and markers == [1.0, 3.0]
    assert uneven.spread == pytest.approx(0.5)
    found = estimated(measured(4, labels=uneven))
    labels, betons = found.seconds["labels"], found.seconds["betons"]
    assert found.spread == pytest.approx(0.5 * labels / (labels + betons))


def test_small_shards_make_one_group_and_large_ones_many() -> None:
    def shards_in_a_group(rows: int, count: int = 8, size: int = 1000, **settings: Any) -> int:
        part = ShardPart.model_construct(name="0", rows=rows)
        return group_shards(
            [Member(shard(0, size), part, 0, size)], count, load_pipeline().build.model_copy(update=settings)
        )

    assert [shards_in_a_group(rows) for rows in (1000, 4000, 40_000)] == [8, 2, 1]
    assert shards_in_a_group(1000, size=2**31) == 2 and shards_in_a_group(1, count=10**6, size=0) == 10_000
    assert (
        shards_in_a_group(4000, count=100, shuffle_window=16) == 16
        and shards_in_a_group(300, count=100, shuffle_window=16) == 32
    )


def test_code_is_compiled_before_the_measurement(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    """What the first build of some shards compiles is kept, and is no part of an estimate."""
    counts = []

    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(
            self, function: Any, sources: object, folder: object, settings: object, count: int, *_: object
        ) -> "Pool":
            counts.append(count)
            return self

        def result(self) -> Sample:
            return measured(4, start_s=-5.0 if len(counts) == 2 else -1.0)

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(module.time, "perf_counter", iter((0.0, 50.0, 60.0, 67.0)).__next__)
    settings = load_pipeline(overrides=["build.workers=1"])
    found = module.estimate([str(data)], tmp_path, settings, samples=None, betons=True)
    assert counts == [1, 3] and found.seconds["start and end"] == 2.0


@pytest.mark.parametrize("workers", [1, 2])
def test_each_task_of_a_pass_is_measured(data: Path, tmp_path: Path, workers: int) -> None:
    settings = load_pipeline(
        overrides=[f"build.workers={workers}", f"labels.ngrams={workers}"]
    )  # pairs are not measured
    found = measure([str(data)], tmp_path, settings, 2, None, True)
    assert found.betons is not None and (found.labels.workers, found.betons.workers) == (workers, workers)
    assert (found.rows, found.rejected, found.group_shards, len(found.names)) == (24, 0, 4, 2)
    assert found.labels.work_s == pytest.approx(found.labels.seconds * found.source_bytes)
    assert found.start_s < -found.labels.work_s and 0 < found.idf_shard_s < found.idf_s


@given(st.integers(1, 10**6), st.integers(1, 40), st.integers(1, 8), st.integers(1, 10**6))
def test_elapsed_is_between_its_bounds(total: int, tasks: int, workers: int, largest: int) -> None:
    seconds = elapsed(0.5, total, tasks, workers, min(largest, total))
    assert 0.5 * max(min(largest, total), total / workers) <= seconds * 1.000001
    assert seconds <= 0.5 * max(min(largest, total), total / workers + total / tasks) * 1.000001


def test_times_are_printed_in_fitting_units() -> None:
    assert [format_seconds(value) for value in (7.84, 600, 36_000)] == ["7.8 s", "10.0 min", "10.0 h"]
