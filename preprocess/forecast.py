"""From measured shards to a whole build: time by stage, disk, memory, cost, and every assumption in words.

A shard's time and bytes grow with its file's bytes; shards are handed to workers in order; each pass has worker processes of its own.
"""

import heapq
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from labels.files import is_remote
from labels.html import format_seconds
from labels.settings import Pipeline
from preprocess.measured import Measured, Pass

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Prices:
    """In any currency: of an hour of this machine, of a GiB stored for a month; None where not given."""

    hour: float | None = None
    gib_month: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What a build will take. `seconds`, `disk_bytes`: by stage; `memory_bytes`: of all processes; `spread`: half the range of
    speed between the measured tasks, as a share; `free_bytes`: where OUT is to be, None for an object store."""

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


def forecast(measured: Measured, settings: Pipeline, out: Path, *, workers: int, samples: int | None, start_s: float) -> Forecast:
    """Extrapolate.

    Args:
        measured: some shards, built side by side.
        settings: resolved configuration.
        out: where OUT is to be.
        workers: processes of the build.
        samples: label rows to foretell for; None takes what DATA is expected to give.
        start_s: from the begin of a build to its first task, its worker processes' end after the label pass, and its own end.
    """
    built, total = measured.built, sum(measured.shards)
    rows = built.rows * total / built.source_bytes
    factor = samples / rows if samples else 1.0
    count = math.ceil(len(measured.shards) * factor)

    def elapsed(one: Pass, sizes: Sequence[int]) -> float:
        times = [size * one.per_byte for size in sizes]
        return one.warm_s + (makespan(times, workers) if factor == 1.0 else max(sum(times) * factor / workers, max(times)))

    # The label pass' workers begin while the main process does, and are in start_s.
    seconds = {
        "start and end": start_s,
        "labels": elapsed(measured.labels, measured.shards),
        "idf": measured.idf_s + measured.summing_s * max(count - len(built.names), 0),
    }
    disk = {"labels": round(built.label_bytes * factor * total / built.source_bytes), "idf": built.table_bytes}
    if measured.betons is not None and (written := measured.written) is not None:
        seconds["betons"] = measured.betons.open_s + elapsed(measured.betons, measured.groups)
        times = factor * total / written.source_bytes
        images = (written.bytes - written.head_bytes) * times
        # Small shards share a beton, and its head.
        heads = max(written.samples * times / settings.build.beton_samples, images / (settings.build.beton_size * 2**30))
        disk["betons"] = round(images + math.ceil(heads) * written.head_bytes / max(written.files, 1))
    peak = max(ran.peak_bytes for one in measured.passes for ran in one.ran)
    by_pass = [seconds["labels"], seconds.get("betons", 0.0)]
    return Forecast(
        shards=count, source_bytes=round(total * factor), rows=samples or round(rows), measured=built.names,
        seconds=seconds, disk_bytes=disk,
        memory_bytes=round(peak * (1 if workers == 1 or count == 1 else workers + 1) + _bytes(settings.build.duckdb_memory)),
        free_bytes=None if is_remote(out) else _free(out),
        spread=sum(one.spread * spent for one, spent in zip(measured.passes, by_pass, strict=False)) / sum(by_pass),
        assumptions=_assumptions(measured, settings, workers=workers, samples=samples),
    )  # fmt: skip


def makespan(times: Sequence[float], workers: int) -> float:
    """Seconds until the last of some tasks ends, each begun in order by the first worker that is free."""
    free_at = [0.0] * workers
    for task in times:
        heapq.heappush(free_at, heapq.heappop(free_at) + task)
    return max(free_at)


def _assumptions(measured: Measured, settings: Pipeline, *, workers: int, samples: int | None) -> list[str]:
    built, written, names = measured.built, measured.written, ", ".join(measured.built.names)
    left_out = built.left_out + (round(written.left_out * built.source_bytes / written.source_bytes) if written else 0)
    told = [
        f"the other shards are as {names}: the same time, rows and bytes for each byte of a shard's file",
        f"{workers} workers on this machine, each as fast as the {len(measured.labels.ran)} that were measured side by side",
        "the disk keeps its speed: what was measured is short, and may have gone to memory first",
        "the network, where shards or OUT are remote, keeps the speed it had",
        "nothing else runs, and nothing has to be done twice",
        f"as many samples are left out elsewhere: {left_out} of {built.left_out + built.rows:,} here",
        f"memory: {workers} workers and the main process, each as large as the largest seen, and build.duckdb_memory of "
        f"{settings.build.duckdb_memory}; files that are mapped count although the system can drop them",
        "the IDF table grows by what the sum of the counts takes for each shard more",
    ]
    if samples:
        told.append(f"{samples:,} samples lie in shards of the size of these {len(measured.shards)}")
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
        table.add_row(stage, format_seconds(seconds), _size(found.disk_bytes[stage]) if stage in found.disk_bytes else "")
    table.add_row("total", format_seconds(3600 * found.hours), _size(sum(found.disk_bytes.values())))
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
