"""`preprocess plan`: what a build will take, foretold from two or three shards that are really built, in a temporary folder.

DATA -> a few shards of usual size, one a process, side by side -> seconds and bytes of each stage -> all of DATA, or --samples of it
"""

import io
import resource
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labels import beton
from labels.errors import UserError
from labels.files import is_remote
from labels.layout import Layout
from labels.settings import Pipeline
from preprocess.beton_plan import plan_groups
from preprocess.corpus import write_idf
from preprocess.counts import sum_counts
from preprocess.engine import run_tasks, worker_count
from preprocess.forecast import Forecast, Measured, forecast
from preprocess.inputs.captions import parse_caption_key
from preprocess.inputs.rows import read_rows
from preprocess.inputs.shards import Shard, find_shards
from preprocess.passes import beton_pass, label_pass, members, shard_parts
from preprocess.plan import Build
from preprocess.tokens.tokenizer import make_tokenizer

_MOST_MEASURED = 3
_TIMES_SUMMED = 64


@dataclass(frozen=True)
class _Task:
    """One shard to build in a folder of its own; `asked`: the time on the clock when it was handed out."""

    shard: Shard
    folder: Path
    settings: Pipeline
    betons: bool
    asked: float


def estimate(sources: list[str], out: Path, settings: Pipeline, *, samples: int | None, betons: bool) -> Forecast:
    """Measure some shards and foretell the build of all.

    Args:
        sources: what build-labels would get.
        out: where OUT is to be; only its disk is looked at.
        settings: resolved configuration.
        samples: foretell for so many label rows instead of those of `sources`.
        betons: False for a build that stops after the IDF table.

    Raises:
        UserError: no shards, or a shard that was measured gave no label row.
    """
    shards = find_shards(sources).shards
    workers = worker_count(settings.build.workers)
    chosen = choose_shards(shards, 2 if workers == 2 else _MOST_MEASURED)
    with tempfile.TemporaryDirectory(dir=_scratch(out)) as folder:
        places = [Path(folder) / str(number) for number in range(len(chosen))]
        tasks = [_Task(shard, place, settings, betons, time.time()) for shard, place in zip(chosen, places, strict=True)]
        measured, last = [], time.perf_counter()
        for one in run_tasks(_measure, tasks, min(workers, len(chosen))):
            measured.append(one)
            last = time.perf_counter()
        stop_s = time.perf_counter() - last
        counts = [Layout(place).count_file(shard.name) for shard, place in zip(chosen, places, strict=True)]
        summing = _summing_seconds(counts, measured[0].vocabulary, settings, Path(folder))
    if not sum(one.rows for one in measured):
        raise UserError(f"the shards that were measured ({', '.join(shard.name for shard in chosen)}) give no label row")
    return forecast(shards, measured, settings, out, workers=workers, samples=samples, betons=betons, summing=summing, stop_s=stop_s)


def choose_shards(shards: list[Shard], count: int) -> list[Shard]:
    """The shards to measure: of middling size, from the beginning, the middle and the end of the data."""
    count = min(count, len(shards))
    chosen = []
    for part in range(count):
        stretch = shards[part * len(shards) // count : (part + 1) * len(shards) // count]
        by_size = sorted(stretch, key=lambda shard: (shard.bytes, shard.name))
        chosen.append(by_size[len(by_size) // 2])
    return chosen


def _scratch(out: Path) -> str | None:
    """The folder for what is built and thrown away: on the disk where OUT is to be, if that is there."""
    if is_remote(out):
        return None
    return str(next((folder for folder in (out, *out.resolve().parents) if folder.is_dir()), None))


def _measure(task: _Task) -> Measured:
    started = time.time() - task.asked
    with redirect_stderr(io.StringIO()):  # the passes' progress
        return _build(task, started)


def _build(task: _Task, started: float) -> Measured:
    """Build one shard in this process, which began to run `started` seconds after the task was handed out."""
    settings = task.settings.model_copy(update={"build": task.settings.build.model_copy(update={"engine": "local", "workers": 1})})
    captions = parse_caption_key(settings.build.caption_key)
    layout = Layout(task.folder)
    begin = time.perf_counter()
    tokenizer = make_tokenizer(settings.labels)
    tokenizer_s = time.perf_counter() - begin
    build = Build(layout, settings, tokenizer, 1, captions, None)
    shards = [task.shard]
    # Everything twice: the first time loads compiled code and meets every word, as a worker does that has just been started.
    read_first, read_again = (_seconds(lambda: deque(read_rows(task.shard, captions), maxlen=0)) for _ in range(2))
    label_first = _seconds(lambda: label_pass(build, shards, shards))
    layout.label_marker(task.shard.name).unlink()
    label_again = _seconds(lambda: label_pass(build, shards, shards))
    marker = label_pass(build, shards, shards)[0]
    parts = shard_parts(shards, [marker])
    idf_s = _seconds(lambda: write_idf(build, parts, [marker]))
    groups = plan_groups([members(shards, parts, [marker], 0)], settings.build)
    beton_s = _seconds(lambda: beton_pass(build, groups, groups, copy=True)) if task.betons else 0.0
    written = beton_pass(build, groups, groups, copy=True) if task.betons else []
    files = [file for one in written for file in one["files"]]
    return Measured(
        name=task.shard.name,
        source_bytes=task.shard.bytes,
        vocabulary=len(build.tokenizer.tokens),
        rows=marker["rows"],
        samples=sum(file["samples"] for file in files),
        left_out=sum(marker["reasons"].values()) + sum(sum(part["reasons"].values()) for part in written),
        start_s=started,
        tokenizer_s=tokenizer_s,
        read_warm_s=max(read_first - read_again, 0.0),
        label_warm_s=max(label_first - label_again, 0.0),
        label_s=label_again,
        idf_s=idf_s,
        beton_s=beton_s,
        label_bytes=layout.label_file(task.shard.name).stat().st_size + layout.count_file(task.shard.name).stat().st_size,
        table_bytes=layout.idf_parquet.stat().st_size + layout.idf_duckdb.stat().st_size,
        beton_bytes=sum(file["bytes"] for file in files),
        head_bytes=sum(_head_bytes(layout.beton_file(file["number"])) for file in files),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _head_bytes(path: Path) -> int:
    header = np.fromfile(path, beton.HEADER, 1)[0]
    return beton.first_page_offset(int(header["num_samples"]), int(header["page_size"]))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _summing_seconds(counts: list[Path], vocabulary: int, settings: Pipeline, spill: Path) -> float:
    """Seconds that the sum of the counts takes for each shard more."""
    begin = time.perf_counter()
    sum_counts(counts, vocabulary, settings.build.duckdb_memory, spill)
    middle = time.perf_counter()
    sum_counts(counts * _TIMES_SUMMED, vocabulary, settings.build.duckdb_memory, spill)
    end = time.perf_counter()
    return max((end - middle) - (middle - begin), 0.0) / (len(counts) * (_TIMES_SUMMED - 1))
