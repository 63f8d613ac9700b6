"""`preprocess plan`: its disk and rows are those of the build; the arithmetic of time; what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labels.config import load_pipeline
from labels.show.html import format_seconds
from preprocess import estimate as module
from preprocess.estimate import Pass, Sample, choose_shards, elapsed, extrapolate, measure
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
    labels, betons = (Pass(2, seconds, start_s=0.5, peak_bytes=1 << 20) for seconds in (0.02, 0.04))
    values = {"rows": 20_000, "rejected": 0, "label_bytes": 14, "table_bytes": 11, "idf_s": 3.0, "idf_shard_s": 0.1}
    passes = {"labels": labels, "betons": betons, "beton_bytes": 0.9}
    return Sample(**{"shards": [100] * shards, "names": ["0", "1"], "source_bytes": 200, **values, **passes, **changed})


def estimated(sample: Sample, workers: int = 2, samples: int | None = None) -> dict[str, Any]:
    return extrapolate(sample, load_pipeline(), workers=workers, samples=samples)


def test_stages_add_up() -> None:
    found = estimated(measured(4))
    assert found["seconds"] == pytest.approx({"labels": 4.5, "idf": 3.2, "betons": 8.5})
    assert found["disk_bytes"] == {"labels": 28, "idf": 11, "betons": 360}
    assert (found["rows"], found["memory_bytes"]) == (40_000, 3 * 2**20 + 2**30)
    more = estimated(measured(4), samples=400_000)
    assert more["shards"] == 40 and more["seconds"]["betons"] == pytest.approx(80.5)
    assert more["disk_bytes"] == {"labels": 280, "idf": 11, "betons": 3600}


def test_one_beton_is_written_by_one_process() -> None:
    assert estimated(measured(4, group_bytes=400))["seconds"]["betons"] == pytest.approx(16.5)


def test_a_build_without_betons() -> None:
    found = estimated(measured(4, betons=None), workers=1)
    assert list(found["seconds"]) == ["labels", "idf"] and list(found["disk_bytes"]) == ["labels", "idf"]
    assert found["seconds"]["labels"] == pytest.approx(8.5) and found["memory_bytes"] == 2**20 + 2**30


def test_the_first_task_of_a_worker_is_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, tasks of 100 bytes: the first of each takes 5 s and 4 s, the later ones 2 s."""
    ended = [(1, 70, 4.0, "b"), (0, 71, 5.0, "a"), (3, 70, 2.0, "d"), (2, 71, 2.0, "c")]
    results = [module._Timed(number, process, took, 7, marker) for number, process, took, marker in ended]
    monkeypatch.setattr(module, "run_tasks", lambda *_: iter(results))
    monkeypatch.setattr(module.time, "perf_counter", iter((10.0, 17.0)).__next__)
    assert module._time_pass(len, [(None, 100)] * 4, 2) == (Pass(2, 0.02, 3.0, 7), ["a", "b", "c", "d"])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_sample_is_a_build(data: Path, tmp_path: Path, workers: int) -> None:
    settings = load_pipeline(overrides=[f"build.workers={workers}", f"labels.ngrams={workers}"])
    found = measure([str(data)], tmp_path, settings, 2, None, True)  # word pairs are not measured
    assert found.betons is not None and (found.labels.workers, found.betons.workers) == (workers, workers)
    assert (found.rows, found.rejected, len(found.names)) == (24, 0, 2)
    assert found.labels.seconds > 0 and found.betons.seconds > 0 and 0 < found.idf_shard_s < found.idf_s


@given(st.integers(1, 10**6), st.integers(1, 8), st.integers(1, 10**6))
def test_elapsed_is_between_its_bounds(total: int, workers: int, largest: int) -> None:
    seconds, largest = elapsed(Pass(2, 0.5, 3.0, 1), total, workers, min(largest, total)), min(largest, total)
    assert seconds == pytest.approx(3.0 + 0.5 * max(largest, total / workers))


def test_times_are_printed_in_fitting_units() -> None:
    assert [format_seconds(value) for value in (7.84, 600, 36_000)] == ["7.8 s", "10.0 min", "10.0 h"]
