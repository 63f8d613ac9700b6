"""From measured shards to a whole build: time by stage, disk, memory, cost, and every assumption in words.

A shard's time and bytes grow with its file's bytes; shards are handed to workers in order; each pass starts its workers anew.
"""

import heapq
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from labels.files import is_remote
from labels.settings import Pipeline
from labels.told import time_told
from preprocess.inputs.shards import Shard

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Measured:
    """One shard that was built. Seconds: `start_s` until its process ran, `tokenizer_s` of making the tokenizer, `read_warm_s` and
    `label_warm_s` of loading compiled code for reading and for tokenizing, `label_s` and `beton_s` of the work itself, `idf_s` of the
    tables. `head_bytes`: of its betons, what lies before the first image. `peak_bytes`: of its process."""

    name: str
    source_bytes: int
    vocabulary: int
    rows: int
    samples: int
    left_out: int
    start_s: float
    tokenizer_s: float
    read_warm_s: float
    label_warm_s: float
    label_s: float
    idf_s: float
    beton_s: float
    label_bytes: int
    table_bytes: int
    beton_bytes: int
    head_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Prices:
    """In any currency: of an hour of this machine, of a GiB stored for a month; None where not given."""

    hour: float | None = None
    gib_month: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What a build will take. `seconds`, `disk_bytes`: by stage; `memory_bytes`: of all processes; `spread`: half the range of
    speed between the measured shards, as a share; `free_bytes`: where OUT is to be, None for an object store."""

    shards: int
    source_bytes: int
    rows: int
    measured: list[str]
    seconds: dict[str, float]
    disk_bytes: dict[str, int]
    memory_bytes: int
    free_bytes: int | None
    spread: float
    assumptions: list[str]

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def gib(self) -> float:
        return sum(self.disk_bytes.values()) / 2**30

    def costs(self, prices: Prices) -> dict[str, float]:
        """What the given prices make of it."""
        build = {} if prices.hour is None else {"build": self.hours * prices.hour}
        return build | ({} if prices.gib_month is None else {"storage_a_month": self.gib * prices.gib_month})

    def describe(self, prices: Prices) -> dict[str, Any]:
        """JSON-able."""
        return {
            "shards": self.shards, "source_bytes": self.source_bytes, "rows": self.rows, "measured": self.measured,
            "seconds": self.seconds, "total_seconds": sum(self.seconds.values()), "disk_bytes": self.disk_bytes,
            "total_disk_bytes": sum(self.disk_bytes.values()), "memory_bytes": self.memory_bytes, "free_bytes": self.free_bytes,
            "spread": self.spread, "costs": self.costs(prices), "assumptions": self.assumptions,
        }  # fmt: skip


def forecast(
    shards: Sequence[Shard], measured: Sequence[Measured], settings: Pipeline, out: Path, *, workers: int, samples: int | None,
    betons: bool, summing: float, stop_s: float,
) -> Forecast:  # fmt: skip
    """Extrapolate.

    Args:
        shards: all of DATA.
        measured: some of them, built side by side.
        settings: resolved configuration.
        out: where OUT is to be.
        workers: processes of the build.
        samples: label rows to foretell for; None takes what DATA is expected to give.
        betons: whether there is a second pass.
        summing: seconds that the sum of the counts takes for each shard more.
        stop_s: seconds until processes that have done their work have ended.
    """
    total = sum(shard.bytes for shard in shards)
    built = sum(one.source_bytes for one in measured)
    rows = sum(one.rows for one in measured) * total / built
    factor = samples / rows if samples else 1.0
    count = math.ceil(len(shards) * factor)

    def per_byte(name: str) -> float:
        return sum(getattr(one, name) for one in measured) / built

    def mean(name: str) -> float:
        return fmean(getattr(one, name) for one in measured[:workers])  # those that were the first in their process

    def elapsed(name: str) -> float:
        times = [shard.bytes * per_byte(name) for shard in shards]
        return makespan(times, workers) if factor == 1.0 else max(sum(times) * factor / workers, max(times))

    alone = workers == 1 or count == 1  # then the work is done in the main process, which is there
    start = 0.0 if alone else mean("start_s") + stop_s  # of a pass' workers, which begin and end with it
    seconds = {
        "start and end": mean("start_s") + mean("tokenizer_s") + stop_s,
        "labels": start + (0.0 if alone else mean("tokenizer_s")) + mean("label_warm_s") + mean("read_warm_s") + elapsed("label_s"),
        "idf": mean("idf_s") + summing * count,
    }
    disk = {"labels": round(per_byte("label_bytes") * total * factor), "idf": round(mean("table_bytes"))}
    if betons:
        seconds["betons"] = start + (0.0 if alone else mean("read_warm_s")) + elapsed("beton_s")
        images = (per_byte("beton_bytes") - per_byte("head_bytes")) * total * factor
        # Small shards share a beton, and its head.
        heads = max(per_byte("samples") * total * factor / settings.build.beton_samples, images / (settings.build.beton_size * 2**30))
        disk["betons"] = round(images + math.ceil(heads) * mean("head_bytes"))
    speeds = [(one.label_s + one.beton_s) / one.source_bytes for one in measured]
    return Forecast(
        shards=count, source_bytes=round(total * factor), rows=samples or round(rows), measured=[one.name for one in measured],
        seconds=seconds, disk_bytes=disk,
        memory_bytes=round(max(one.peak_bytes for one in measured) * (1 if alone else workers + 1) + _bytes(settings.build.duckdb_memory)),
        free_bytes=None if is_remote(out) else _free(out), spread=(max(speeds) - min(speeds)) / (2 * fmean(speeds)),
        assumptions=_assumptions(len(shards), measured, settings, workers=workers, samples=samples),
    )  # fmt: skip


def makespan(times: Sequence[float], workers: int) -> float:
    """Seconds until the last of some tasks ends, each begun in order by the first worker that is free."""
    free_at = [0.0] * workers
    for task in times:
        heapq.heappush(free_at, heapq.heappop(free_at) + task)
    return max(free_at)


def _assumptions(shards: int, measured: Sequence[Measured], settings: Pipeline, *, workers: int, samples: int | None) -> list[str]:
    names = ", ".join(one.name for one in measured)
    left_out = sum(one.left_out for one in measured)
    told = [
        f"the other shards are as {names}: the same time, rows and bytes for each byte of a shard's file",
        f"{workers} workers on this machine, each as fast as the {len(measured)} that were measured side by side",
        "the disk keeps its speed: what was measured is short, and may have gone to memory first",
        "the network, where shards or OUT are remote, keeps the speed it had",
        "nothing else runs, and nothing has to be done twice",
        f"as many samples are left out elsewhere: {left_out} of {left_out + sum(one.rows for one in measured):,} here",
        f"memory: {workers} workers and the main process, each as large as the largest seen, and build.duckdb_memory of "
        f"{settings.build.duckdb_memory}; files that are mapped count although the system can drop them",
        "the IDF table grows by what the sum of the counts takes for each shard more",
    ]
    if samples:
        told.append(f"{samples:,} samples lie in shards of the size of these {shards}")
    if settings.build.subset is not None:
        told.append("every sample is labelled: build.subset is left aside, and makes labels and betons smaller")
    if settings.labels.ngrams > 1:
        told.append("without the pass that counts word pairs and adds them (labels.ngrams), which was not measured")
    if settings.build.engine == "ray":
        told.append("processes of this machine: a Ray cluster of n such machines takes about the n-th part, its start not counted")
    return told


def print_estimate(found: Forecast, prices: Prices, console: Console) -> None:
    """For people."""
    console.print(
        f"{found.shards:,} shards, {_size(found.source_bytes)}, about {found.rows:,} label rows; measured: {', '.join(found.measured)}"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "time", "disk"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, seconds in found.seconds.items():
        table.add_row(stage, time_told(seconds), _size(found.disk_bytes[stage]) if stage in found.disk_bytes else "")
    table.add_row("total", time_told(3600 * found.hours), _size(sum(found.disk_bytes.values())))
    console.print(table)
    console.print(f"speed of the measured shards: within {found.spread:.0%} of their mean; memory: about {_size(found.memory_bytes)}")
    for name, cost in found.costs(prices).items():
        basis = f"{found.hours:,.2f} h at {prices.hour}" if name == "build" else f"{found.gib:,.2f} GiB at {prices.gib_month}"
        console.print(f"cost of the {name.replace('_', ' ')}: {cost:,.2f} ({basis})")
    if found.free_bytes is not None and found.free_bytes < sum(found.disk_bytes.values()):
        console.print(f"it does not fit: {_size(found.free_bytes)} are free there; mend: free space, or give another --out")
    console.print("assumed:")
    for line in found.assumptions:
        console.print(f"  - {line}")


def _size(count: float) -> str:
    for unit in ("TiB", "GiB", "MiB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:,.1f} {unit}"
    return f"{count / 2**10:,.0f} KiB"


def _bytes(text: str) -> float:
    """`1GiB`, as build.duckdb_memory is written."""
    digits = text.rstrip("KMGTiB ")
    return float(digits) * _UNITS[text[len(digits) :].strip()]


def _free(out: Path) -> int:
    folder = next(place for place in (out.resolve(), *out.resolve().parents) if place.is_dir())
    return shutil.disk_usage(folder).free
