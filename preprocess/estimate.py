"""`preprocess plan`: time, disk, memory and cost of a build, estimated from two or three shards that it builds.

    DATA -> shards of medium size -> built by the build's own functions, in a fresh process -> Sample
    Sample: seconds and bytes of each stage per byte of a shard's file -> Estimate for all of DATA

In each pass several workers do several tasks each, at the same time. A worker's first task also loads code and fills
caches; the others are measured. The other time of the process is the fixed start. The aim is to be within 25%.
"""

import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from labels.html import format_seconds
from labels.settings import Build, Pipeline
from labels.storage import Layout, UserError, is_remote
from preprocess.betons.plan import Member, plan_groups
from preprocess.betons.write import GroupTask, write_group
from preprocess.build import make_build, members, shard_parts, write_idf
from preprocess.counts import sum_counts
from preprocess.engine import run_tasks, start_server, worker_count
from preprocess.readers.shards import Shard, find_shards
from preprocess.shard import LabelTask, label_shard

_Tasks = list[tuple[Any, int]]  # of a worker, each with the bytes of its shards
_TIMES_SUMMED = 64
_GROUP_BYTES = 1 << 28  # most bytes of shards in a measured task of the second pass


class Pass(NamedTuple):
    """A pass over sampled shards by `workers` processes at the same time."""

    workers: int
    seconds: float  # of one worker for each byte of a shard's file
    spread: float  # half the range of `seconds` between tasks, as a share
    work_s: float  # `seconds` for all tasks of one worker
    peak_bytes: int  # the most memory of a process


@dataclass(frozen=True)
class Sample:
    """Measured shards and their output."""

    shards: list[int]  # bytes of each shard of DATA, not only of the measured
    names: list[str]
    source_bytes: int
    rows: int
    rejected: int
    label_bytes: int
    table_bytes: int
    idf_s: float
    idf_shard_s: float  # for each further shard
    start_s: float  # of the process, beyond its work
    labels: Pass
    betons: Pass | None = None
    beton_bytes: float = 0.0  # for each byte of a shard's file
    group_shards: int = 1  # in a task of the second pass

    def factor(self, samples: int | None) -> float:
        """How many times DATA has `samples` label rows; 1 for None."""
        return samples / (self.rows * sum(self.shards) / self.source_bytes) if samples else 1.0


@dataclass(frozen=True)
class Estimate:
    """What a build takes."""

    shards: int
    source_bytes: int
    rows: int
    measured: list[str]  # names of shards
    seconds: dict[str, float]  # by stage
    disk_bytes: dict[str, int]  # by stage
    memory_bytes: int  # of all processes
    free_bytes: int | None  # None for an object store
    spread: float  # half the range of speed between measured tasks, as a share
    assumptions: list[str]

    def describe(self, price_per_hour: float | None, price_per_gib_month: float | None) -> dict[str, Any]:
        """JSON-able, with totals and costs; prices in any currency."""
        seconds, disk_bytes = sum(self.seconds.values()), sum(self.disk_bytes.values())
        prices = {
            "build": (seconds / 3600, price_per_hour),
            "storage_a_month": (disk_bytes / 2**30, price_per_gib_month),
        }
        costs = {name: amount * price for name, (amount, price) in prices.items() if price is not None}
        return {**vars(self), "total_seconds": seconds, "total_disk_bytes": disk_bytes, "costs": costs}


def estimate(sources: list[str], out: Path, settings: Pipeline, *, samples: int | None, betons: bool) -> Estimate:
    """Measure some shards and estimate the build of all.

    Args:
        sources: as of build-labels.
        out: the output folder; only the free space on its disk is read.
        settings: resolved configuration.
        samples: estimate for this many label rows instead of those of `sources`.
        betons: False for a build that stops after the IDF table.

    Raises:
        UserError: no shards, or those that were measured gave no label row.
    """
    workers = worker_count(settings.build.workers)
    existing = None if is_remote(out) else next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())

    def measured(count: int) -> tuple[Sample, float]:
        """A sample of `count` shards, and the seconds from the start of its process to the end."""
        with tempfile.TemporaryDirectory(dir=existing) as folder:
            begin, context = time.perf_counter(), multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context, start_server if workers > 1 else None) as pool:
                sample = pool.submit(measure, sources, Path(folder), settings, count, samples, betons).result()
            return sample, time.perf_counter() - begin

    measured(1)  # compiles code for all later builds
    sample, seconds = measured(2 if workers == 2 else 3)
    sample = replace(sample, start_s=max(seconds + sample.start_s, 0.0))
    free = None if existing is None else shutil.disk_usage(existing).free
    return extrapolate(sample, settings, workers=workers, samples=samples, free_bytes=free)


def measure(
    sources: list[str], folder: Path, settings: Pipeline, count: int, samples: int | None, betons: bool
) -> Sample:
    """Build `count` shards in an empty folder, each stage timed; `start_s` is minus the time of the stages."""
    shards = find_shards(sources).shards
    chosen = choose_shards(shards, count)
    workers = min(worker_count(settings.build.workers), len(chosen))
    labels_only = settings.labels.model_copy(update={"ngrams": 1})  # word pairs need a pass over all shards
    build = make_build(Layout(folder / "0"), settings.model_copy(update={"labels": labels_only}), None)
    layout, memory = build.layout, settings.build.duckdb_memory
    options = (labels_only, build.captions, False, build.label_options)
    label_tasks = []
    for worker in range(workers):
        order = chosen[worker:] + chosen[:worker] if len(chosen) > 1 else chosen * 2
        label_tasks.append([(LabelTask(shard, folder / str(worker), *options), shard.bytes) for shard in order])
    labels, results = _time_pass(label_shard, label_tasks)
    markers = [next(marker for marker in results if marker.shard == shard.name) for shard in chosen]
    parts = shard_parts(chosen, markers)
    if not sum(part.rows for part in parts):
        names = ", ".join(shard.name for shard in chosen)
        raise UserError(
            f"the measured shards ({names}) have no label row", fix="check build.caption_key and build.subset"
        )

    idf_s = _seconds(lambda: write_idf(build, parts, markers))
    counts = [layout.count_file(shard.name) for shard in chosen]
    many = counts * _TIMES_SUMMED
    many_s = _seconds(lambda: sum_counts(many, len(build.tokenizer.tokens), memory, folder / "spill"))
    label_files = [layout.label_file(shard.name) for shard in chosen]
    sample = Sample(
        shards=[shard.bytes for shard in shards],
        names=[shard.name for shard in chosen],
        source_bytes=sum(shard.bytes for shard in chosen),
        rows=sum(part.rows for part in parts),
        rejected=sum(sum(part.quarantined.values()) for part in parts),
        label_bytes=sum(file.stat().st_size for file in counts + label_files),
        table_bytes=layout.idf_parquet.stat().st_size + layout.idf_duckdb.stat().st_size,
        idf_s=idf_s,
        idf_shard_s=many_s / len(many),
        start_s=-(labels.work_s + idf_s + many_s),
        labels=labels,
    )
    if not betons:
        return sample

    # A beton has a cost beyond its bytes, so a measured task is as large as one of the build: it repeats the shards.
    with_rows, shard_bytes = members(chosen, parts, markers), sum(shard.bytes for shard in shards) / len(shards)
    usual = group_shards(with_rows, ceil(len(shards) * sample.factor(samples)), settings.build)
    repeated = min(usual, max(len(chosen), int(_GROUP_BYTES / shard_bytes)))
    group_tasks, first = [], 0
    for worker in range(workers):
        order = [with_rows[(worker + number) % len(with_rows)] for number in range(repeated)]
        group = replace(plan_groups([order], settings.build)[0], first=first)
        first += group.files
        options = (layout.out, settings.build, build.image_options)
        task = GroupTask(group, build.label_limit, build.captions, *options, copy=True)
        group_tasks.append([(task, sum(member.shard.bytes for member in group.members))] * 2)
    written, markers = _time_pass(write_group, group_tasks)
    source_bytes = sum(size for [(_, size), _] in group_tasks)
    without_image = sum(sum(marker.reasons.values()) for marker in markers) / 2
    return replace(
        sample,
        rejected=sample.rejected + round(without_image * sample.source_bytes / source_bytes),
        start_s=sample.start_s - written.work_s,
        betons=written,
        beton_bytes=sum(file.stat().st_size for file in layout.betons.glob("*.beton")) / source_bytes,
        group_shards=usual,
    )


def group_shards(sampled: list[Member], count: int, settings: Build) -> int:
    """How many of `count` shards like the sampled share a group, which is a task of the second pass."""
    window = settings.shuffle_window
    rows, size = fmean(member.part.rows for member in sampled), max(fmean(member.bytes for member in sampled), 1)
    windows = int(min(settings.beton_samples / rows, settings.beton_size * 2**30 / size) / window)
    return min(count, max(windows, 1) * window)


def choose_shards(shards: list[Shard], count: int) -> list[Shard]:
    """The shards to measure: of medium size, from the beginning, the middle and the end of the data."""
    count = min(count, len(shards))
    bounds = [part * len(shards) // count for part in range(count + 1)]
    parts = [shards[begin:end] for begin, end in pairwise(bounds)]
    return [sorted(part, key=lambda shard: (shard.bytes, shard.name))[len(part) // 2] for part in parts]


def _time_pass(function: Callable[[Any], Any], tasks: list[_Tasks]) -> tuple[Pass, list[Any]]:
    """Run a list of (task, bytes) in each of several workers; also what `function` returned."""
    results = list(run_tasks(_time_tasks, [(function, of_worker) for of_worker in tasks], len(tasks)))
    warm = [timed for timings, _, _ in results for timed in timings[1:]]
    speeds = [took / size for took, size in warm]
    seconds = sum(took for took, _ in warm) / sum(size for _, size in warm)
    timed_pass = Pass(
        workers=len(tasks),
        seconds=seconds,
        spread=(max(speeds) - min(speeds)) / (2 * fmean(speeds)),
        work_s=seconds * fmean(sum(size for _, size in timings) for timings, _, _ in results),
        peak_bytes=max(peak for _, peak, _ in results),
    )
    return timed_pass, [marker for _, _, markers in results for marker in markers]


def _time_tasks(job: tuple[Callable[[Any], Any], _Tasks]) -> tuple[list[tuple[float, int]], int, list[Any]]:
    """In a worker: seconds and bytes of each task, the most memory of the process, and what `function` returned."""
    function, tasks = job
    timings, markers = [], []
    for task, size in tasks:
        timings.append((_seconds(lambda task=task: markers.append(function(task))), size))
    return timings, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, markers


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def elapsed(seconds: float, total: float, tasks: int, workers: int, largest: float) -> float:
    """Seconds of a pass over `total` bytes in even tasks, with `seconds` a byte; the `largest` shard is one task."""
    return seconds * max(ceil(tasks / workers) * total / tasks, largest)


def extrapolate(
    sample: Sample, settings: Pipeline, *, workers: int, samples: int | None, free_bytes: int | None
) -> Estimate:
    """From measured shards to all of DATA, or to `samples` label rows in shards like these."""
    factor = sample.factor(samples)
    count, total, largest = ceil(len(sample.shards) * factor), sum(sample.shards) * factor, max(sample.shards)
    seconds = {
        "start and end": sample.start_s,
        "labels": elapsed(sample.labels.seconds, total, count, workers, largest),
        "idf": sample.idf_s + sample.idf_shard_s * max(count - len(sample.names), 0),
    }
    disk = {"labels": round(sample.label_bytes * total / sample.source_bytes), "idf": sample.table_bytes}
    passes = {"labels": sample.labels}
    if sample.betons:
        passes["betons"] = sample.betons
        groups = ceil(count / sample.group_shards)
        seconds["betons"] = elapsed(sample.betons.seconds, total, groups, workers, largest)
        disk["betons"] = round(sample.beton_bytes * total)
    timed_s = sum(seconds[stage] for stage in passes)
    memory, processes = settings.build.duckdb_memory, 1 if workers == 1 or count == 1 else workers + 1
    return Estimate(
        shards=count,
        source_bytes=round(total),
        rows=samples or round(sample.rows * total / sample.source_bytes),
        measured=sample.names,
        seconds=seconds,
        disk_bytes=disk,
        memory_bytes=round(max(timed.peak_bytes for timed in passes.values()) * processes + _parse_bytes(memory)),
        free_bytes=free_bytes,
        spread=sum(timed.spread * seconds[stage] for stage, timed in passes.items()) / timed_s,
        assumptions=_assumptions(sample, settings, workers, samples),
    )


def _assumptions(sample: Sample, settings: Pipeline, workers: int, samples: int | None) -> list[str]:
    names, memory = ", ".join(sample.names), settings.build.duckdb_memory
    optional = {
        f"{samples:,} samples are in shards of the size of these {len(sample.shards)}" if samples else "": samples,
        "all samples are labelled: build.subset is ignored, and makes labels and betons smaller": settings.build.subset,
        "without the pass that counts and adds word pairs (labels.ngrams)": settings.labels.ngrams > 1,
        "on this machine: a Ray cluster of n such takes about 1/n of the time": settings.build.engine == "ray",
    }
    return [
        f"the other shards are like {names}: the same seconds, rows and bytes for each byte of a shard's file",
        f"the same share of samples is rejected: {sample.rejected} of {sample.rejected + sample.rows:,}",
        f"{workers} workers, each as fast as the {sample.labels.workers} that were measured at the same time",
        "disk and network keep the measured speed; nothing else runs, and nothing is repeated",
        f"memory: every process needs as much as the largest, and build.duckdb_memory: {memory}",
        *(line for line, condition in optional.items() if condition),
    ]


def print_estimate(described: dict[str, Any], console: Console) -> None:
    """For people; `described`: of `Estimate.describe`."""
    plan = SimpleNamespace(**described)
    size, disk = _format_bytes(plan.source_bytes), plan.disk_bytes
    data = f"{plan.shards:,} shards, {size}, about {plan.rows:,} label rows"
    console.print(f"{data}; measured: {', '.join(plan.measured)}")
    table = Table("stage", Column("time", justify="right"), Column("disk", justify="right"), box=None, pad_edge=False)
    for stage, seconds in plan.seconds.items():
        table.add_row(stage, format_seconds(seconds), _format_bytes(disk[stage]) if stage in disk else "")
    table.add_row("total", format_seconds(plan.total_seconds), _format_bytes(plan.total_disk_bytes))
    console.print(table)
    memory = _format_bytes(plan.memory_bytes)
    console.print(f"speed of the measured shards: within {plan.spread:.0%} of their mean; memory: about {memory}")
    for name, cost in plan.costs.items():
        console.print(f"cost of the {name.replace('_', ' ')}: {cost:,.2f}")
    if plan.free_bytes is not None and plan.free_bytes < plan.total_disk_bytes:
        free = _format_bytes(plan.free_bytes)
        console.print(f"error: only {free} of disk are free\nfix: free space, or give another --out")
    console.print("assumptions:", *plan.assumptions, sep="\n  - ")


def _format_bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.0f} KiB"


def _parse_bytes(text: str) -> float:
    """`1GiB`, as build.duckdb_memory is written."""
    number = text.rstrip("KMGTiB ")
    unit = text.removeprefix(number).strip()
    return float(number) * (1024 if "i" in unit else 1000) ** (1 + "KMGT".index(unit[0]))
