"""`preprocess plan`: time, disk, memory and cost of a build, estimated from two or three shards that it builds.

    DATA -> shards of medium size -> built by the tasks of the build itself -> Sample
    Sample: seconds and bytes of each stage per byte of a shard's file -> Estimate for all of DATA

Up to three workers do the tasks of a stage at the same time. The first task of each also loads or compiles code: the
later ones give the speed, and what the stage took beyond it is its start. The aim is to be within 25%.
"""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from labels.settings import Pipeline
from labels.show.html import format_seconds
from labels.show.terminal import count
from labels.storage import Layout, UserError, is_remote
from preprocess.betons.plan import plan_groups
from preprocess.betons.write import GroupTask, write_group
from preprocess.build import make_build, members, shard_parts, write_idf
from preprocess.counts import sum_counts
from preprocess.engine import run_tasks, worker_count
from preprocess.readers.shards import Shard, find_shards
from preprocess.shard import LabelTask, label_shard

_SHARDS_PLANNED = 1_000
_COUNTS_SUMMED = 64  # the counts of a shard are summed this often, to measure what one more shard takes


class Pass(NamedTuple):
    """What the tasks of one stage took."""

    workers: int
    seconds: float  # of one worker for each byte of a shard's file
    start_s: float
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
    labels: Pass
    betons: Pass | None = None
    beton_bytes: float = 0.0  # for each byte of a shard's file
    group_bytes: float = 1.0  # of the shards that one worker writes to betons together

    def factor(self, samples: int | None) -> float:
        """How many times DATA has `samples` label rows; 1 for None."""
        return samples / (self.rows * sum(self.shards) / self.source_bytes) if samples else 1.0


def estimate(sources: list[str], out: Path, settings: Pipeline, *, samples: int | None, betons: bool) -> dict[str, Any]:
    """Measure some shards and estimate the build of all, or of `samples` label rows in shards like these.

    `out` is the output folder: its disk is measured, with files in a temporary folder. Without `betons`, of a build
    that stops after the IDF table. Returns a JSON-able dictionary: times in seconds, sizes in bytes, `disk_bytes` and
    `seconds` by stage. UserError: no shards, or those that were measured gave no label row.
    """
    workers = worker_count(settings.build.workers)
    existing = None if is_remote(out) else next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=existing) as folder:
        sample = measure(sources, Path(folder), settings, 2 if workers == 2 else 3, samples, betons)
    free = None if existing is None else shutil.disk_usage(existing).free
    return {**extrapolate(sample, settings, workers=workers, samples=samples), "free_bytes": free}


def measure(
    sources: list[str], folder: Path, settings: Pipeline, count: int, samples: int | None, betons: bool
) -> Sample:
    """Build `count` shards in an empty folder, each stage timed."""
    shards = find_shards(sources).shards
    chosen = choose_shards(shards, count)
    workers = min(worker_count(settings.build.workers), len(chosen))
    labels_only = settings.labels.model_copy(update={"ngrams": 1})  # word pairs need a pass over all shards
    build = make_build(Layout(folder / "out"), settings.model_copy(update={"labels": labels_only}), None)
    layout, memory = build.layout, settings.build.duckdb_memory
    options = (labels_only, build.captions, False, build.label_options)
    tasks = [LabelTask(shard, layout.out, *options) for shard in chosen]
    # One more task for each worker. A second label file of a shard is written to another folder.
    tasks += [replace(task, out=folder / "again") for task in tasks[:workers]]
    labels, markers = _time_pass(label_shard, [(task, task.shard.bytes) for task in tasks], workers)
    labelled = [next(marker for marker in markers if marker.shard == shard.name) for shard in chosen]
    parts = shard_parts(chosen, labelled)
    if not sum(part.rows for part in parts):
        names = ", ".join(shard.name for shard in chosen)
        raise UserError(
            f"the measured shards ({names}) have no label row", fix="check build.caption_key and build.subset"
        )

    idf_s = _seconds(lambda: write_idf(build, parts, labelled))
    counts = [layout.count_file(shard.name) for shard in chosen]
    many = counts * _COUNTS_SUMMED
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
        labels=labels,
    )
    if not betons:
        return sample

    # A beton has a cost beyond its bytes: those measured have as many shards as in the build.
    with_rows = members(chosen, parts, labelled)
    count = min(ceil(len(shards) * sample.factor(samples)), _SHARDS_PLANNED)
    groups = plan_groups([(with_rows * count)[:count]], settings.build)
    group_bytes = sum(member.shard.bytes for group in groups for member in group.members) / len(groups)
    options = (layout.out, settings.build, build.image_options)
    group_tasks = [GroupTask(group, build.label_limit, build.captions, *options, copy=True) for group in groups]
    group_tasks = group_tasks[: 2 * workers]
    written, markers = _time_pass(write_group, [(task, group_bytes) for task in group_tasks], workers)
    source_bytes = group_bytes * len(group_tasks)
    without_image = sum(sum(marker.reasons.values()) for marker in markers)
    return replace(
        sample,
        rejected=sample.rejected + round(without_image * sample.source_bytes / source_bytes),
        betons=written,
        beton_bytes=sum(file.stat().st_size for file in layout.betons.iterdir()) / source_bytes,
        group_bytes=group_bytes,
    )


def choose_shards(shards: list[Shard], count: int) -> list[Shard]:
    """The shards to measure: of medium size, from the beginning, the middle and the end of the data."""
    count = min(count, len(shards))
    bounds = [part * len(shards) // count for part in range(count + 1)]
    parts = [shards[begin:end] for begin, end in pairwise(bounds)]
    return [sorted(part, key=lambda shard: (shard.bytes, shard.name))[len(part) // 2] for part in parts]


class _Timed(NamedTuple):
    number: int
    process: int
    seconds: float
    peak_bytes: int
    marker: Any


def _time_pass(function: Callable[[Any], Any], tasks: list[tuple[Any, float]], workers: int) -> tuple[Pass, list[Any]]:
    """Run each (task, bytes of its shard); also what `function` returned, sorted as the tasks."""
    begin = time.perf_counter()
    results = list(run_tasks(_time_task, [(function, number, task) for number, (task, _) in enumerate(tasks)], workers))
    took = time.perf_counter() - begin
    first = {result.process: result.number for result in reversed(results)}
    later = [result for result in results if first[result.process] != result.number] or results
    seconds = sum(result.seconds for result in later) / sum(tasks[result.number][1] for result in later)
    start_s = max(took - seconds * sum(size for _, size in tasks) / workers, 0.0)
    timed = Pass(workers, seconds, start_s, max(result.peak_bytes for result in results))
    return timed, [result.marker for result in sorted(results, key=lambda result: result.number)]


def _time_task(job: tuple[Callable[[Any], Any], int, Any]) -> _Timed:
    """In a worker."""
    function, number, task = job
    begin = time.perf_counter()
    marker = function(task)
    seconds = time.perf_counter() - begin
    return _Timed(number, os.getpid(), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, marker)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def elapsed(timed: Pass, total: float, workers: int, largest: float) -> float:
    """Seconds of a stage over `total` bytes; the `largest` shard is one task."""
    return timed.start_s + timed.seconds * max(total / workers, largest)


def extrapolate(sample: Sample, settings: Pipeline, *, workers: int, samples: int | None) -> dict[str, Any]:
    """From measured shards to all of DATA, or to `samples` label rows in shards like these."""
    factor = sample.factor(samples)
    count, total, largest = ceil(len(sample.shards) * factor), sum(sample.shards) * factor, max(sample.shards)
    seconds = {
        "labels": elapsed(sample.labels, total, workers, largest),
        "idf": sample.idf_s + sample.idf_shard_s * max(count - len(sample.names), 0),
    }
    disk = {"labels": round(sample.label_bytes * total / sample.source_bytes), "idf": sample.table_bytes}
    if sample.betons:
        groups = ceil(total / sample.group_bytes)
        seconds["betons"] = elapsed(sample.betons, total, min(workers, groups), largest)
        disk["betons"] = round(sample.beton_bytes * total)
    peak = max(timed.peak_bytes for timed in (sample.labels, sample.betons) if timed)
    memory, processes = settings.build.duckdb_memory, 1 if workers == 1 or count == 1 else workers + 1
    optional = {
        f"{samples:,} samples are in shards of the size of these {len(sample.shards)}" if samples else "": samples,
        "all samples are labelled: build.subset is ignored, and makes labels and betons smaller": settings.build.subset,
        "without the pass that counts and adds word pairs (labels.ngrams)": settings.labels.ngrams > 1,
        "on this machine: a Ray cluster of n such takes about 1/n of the time": settings.build.engine == "ray",
    }
    return {
        "shards": count,
        "source_bytes": round(total),
        "rows": samples or round(sample.rows * total / sample.source_bytes),
        "measured": sample.names,
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "disk_bytes": disk,
        "total_disk_bytes": sum(disk.values()),
        "memory_bytes": round(peak * processes + _parse_bytes(memory)),
        "assumptions": [
            "the other shards are like the measured: the same seconds, rows and bytes for each byte of a shard's file",
            f"the same share of samples is rejected: {sample.rejected} of {sample.rejected + sample.rows:,}",
            f"{workers} workers, each as fast as the {sample.labels.workers} that were measured at the same time",
            "disk and network keep the measured speed; nothing else runs, and nothing is repeated",
            f"memory: every process needs as much as the largest, and build.duckdb_memory: {memory}",
            *(line for line, condition in optional.items() if condition),
        ],
    }


def costs(plan: dict[str, Any], price_per_hour: float | None, price_per_gib_month: float | None) -> dict[str, float]:
    """What an estimate costs, in the currency of the prices: `build`, and `storage_a_month`."""
    hours, gib = plan["total_seconds"] / 3600, plan["total_disk_bytes"] / 2**30
    prices = {"build": (hours, price_per_hour), "storage_a_month": (gib, price_per_gib_month)}
    return {name: amount * price for name, (amount, price) in prices.items() if price is not None}


def print_estimate(plan: dict[str, Any], console: Console) -> None:
    """For people; with the `costs`."""
    size, disk = _format_bytes(plan["source_bytes"]), plan["disk_bytes"]
    data = f"{count(plan['shards'], 'shard')}, {size}, about {count(plan['rows'], 'label row')}"
    console.print(f"{data}; measured: {', '.join(plan['measured'])}")
    table = Table("stage", Column("time", justify="right"), Column("disk", justify="right"), box=None, pad_edge=False)
    for stage, seconds in plan["seconds"].items():
        table.add_row(stage, format_seconds(seconds), _format_bytes(disk[stage]))
    table.add_row("total", format_seconds(plan["total_seconds"]), _format_bytes(plan["total_disk_bytes"]))
    console.print(table)
    console.print(f"memory: about {_format_bytes(plan['memory_bytes'])}")
    for name, cost in plan["costs"].items():
        console.print(f"cost of the {name.replace('_', ' ')}: {cost:,.2f}")
    if plan["free_bytes"] is not None and plan["free_bytes"] < plan["total_disk_bytes"]:
        free = _format_bytes(plan["free_bytes"])
        console.print(f"error: only {free} of disk are free\nfix: free space, or give another --out")
    console.print("assumptions:", *plan["assumptions"], sep="\n  - ")


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
