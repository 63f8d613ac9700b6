"""A build of two or three shards with the build's own functions, each part timed; see rehearsal.py for the process.

find shards, tokenizer -> label pass -> IDF -> beton pass -> Measured

The processes of a pass do several tasks each. The first loads code and meets every word; those after it tell what a shard more takes.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numba.core.event import TimingListener, install_listener

from labels import beton
from labels.errors import UserError
from labels.layout import Layout
from labels.manifest import ShardPart
from labels.settings import Pipeline
from preprocess.beton_job import GroupTask, write_group
from preprocess.beton_plan import Group, Member, plan_groups
from preprocess.build import make_build
from preprocess.corpus import write_idf
from preprocess.counts import sum_counts
from preprocess.engine import run_tasks
from preprocess.inputs.shards import Shard, find_shards
from preprocess.label_job import LabelTask, label_shard
from preprocess.measured import Built, Measured, Pass, Ran, Work, Written
from preprocess.passes import members, shard_parts
from preprocess.plan import Build, Marker
from preprocess.rehearsal import Rehearsal

_MOST_MEASURED = 3
_TIMES_SUMMED = 64


def measure(asked: Rehearsal) -> Measured:
    """See rehearsal.py."""
    settings = Pipeline.model_validate_json(asked.settings)
    shards = find_shards(asked.sources).shards
    chosen = choose_shards(shards, 2 if asked.workers == 2 else _MOST_MEASURED)
    build = make_build(Layout(Path(asked.folder) / "0"), settings, None)
    labels, markers, ended = _label(build, chosen, min(asked.workers, len(chosen)))
    parts = shard_parts(chosen, markers)
    rows, source_bytes = sum(part.rows for part in parts), sum(shard.bytes for shard in chosen)
    if not rows:
        raise UserError(f"the shards that were measured ({', '.join(shard.name for shard in chosen)}) give no label row")
    idf_s = _seconds(lambda: write_idf(build, parts, markers))
    groups = foretold_groups(shards, rows / source_bytes, settings)
    count = len(groups) if asked.samples is None else round(len(groups) * asked.samples * source_bytes / (rows * sum(groups)))
    betons = written = None
    if asked.betons:
        processes, usual = max(1, min(asked.workers, len(chosen), count)), round(len(shards) / len(groups))
        betons, written = _write(build, members(chosen, parts, markers), processes, usual)
    return Measured(
        shards=[shard.bytes for shard in shards],
        groups=groups,
        built=_built(build, chosen, markers),
        labels=labels,
        betons=betons,
        written=written,
        idf_s=idf_s,
        summing_s=_summing_seconds([build.layout.count_file(shard.name) for shard in chosen], build),
        work_s=time.monotonic() - fmean(ran.began for ran in labels.ran) - (ended - max(ran.ended for ran in labels.ran)),
    )


def choose_shards(shards: list[Shard], count: int) -> list[Shard]:
    """The shards to measure: of middling size, from the beginning, the middle and the end of the data."""
    count = min(count, len(shards))
    chosen = []
    for part in range(count):
        stretch = shards[part * len(shards) // count : (part + 1) * len(shards) // count]
        by_size = sorted(stretch, key=lambda shard: (shard.bytes, shard.name))
        chosen.append(by_size[len(by_size) // 2])
    return chosen


def foretold_groups(shards: Sequence[Shard], rows_per_byte: float, settings: Pipeline) -> list[int]:
    """Bytes of the shards of each group of the second pass, which is a task of it, if all shards have as many rows a byte."""
    foretold = []
    for number, shard in enumerate(shards):
        part = ShardPart.model_construct(name=shard.name, rows=max(1, round(shard.bytes * rows_per_byte)))
        foretold.append(Member(shard, part, number, 0 if shard.kind == "csv" else shard.bytes))
    return [sum(member.shard.bytes for member in group.members) for group in plan_groups([foretold], settings.build)]


def _label(build: Build, chosen: list[Shard], processes: int) -> tuple[Pass, list[Marker], float]:
    """The label pass: each process labels all chosen shards, beginning with another one, or a single shard twice; its markers, its end."""
    tasks = []
    for number in range(processes):
        order = [*chosen[number:], *chosen[:number]] if len(chosen) > 1 else chosen * 2
        layout, options = Layout(build.layout.out.parent / str(number)), (build.captions, False, build.label_options)
        tasks.append([LabelTask(shard, layout.out, build.settings.labels, *options) for shard in order])
    found, asked, ended = _side_by_side(_label_shards, tasks)
    markers = {marker["shard"]: marker for marker in found[0][1]}
    return _pass([ran for ran, _ in found], asked, ended), [markers[shard.name] for shard in chosen], ended


def _label_shards(tasks: list[LabelTask]) -> tuple[Ran, list[Marker]]:
    return _ran(label_shard, tasks, [task.shard.bytes for task in tasks])


def _write(build: Build, chosen: list[Member], processes: int, usual: int) -> tuple[Pass, Written]:
    """The second pass: each process writes two groups that begin with different shards, the second over the first.

    A file costs something beside its bytes, so groups are as large as in the build: the chosen shards over and over, `usual` of them.
    """
    tasks, first = [], 0
    for number in range(processes):
        two = [plan_groups([_repeated(chosen, number + later, usual)], build.settings.build)[0] for later in range(2)]
        own = [replace(group, first=first) for group in two]
        first += max(group.files for group in own)
        tasks.append([_group_task(build, group) for group in own])
    found, asked, ended = _side_by_side(_write_groups, tasks)
    ran = [one for one, _ in found]
    files = [file for _, (_, last) in found for file in last["files"]]
    written = Written(
        source_bytes=sum(one.again[-1].bytes for one in ran),
        samples=sum(file["samples"] for file in files),
        left_out=sum(sum(last["reasons"].values()) for _, (_, last) in found),
        bytes=sum(file["bytes"] for file in files),
        head_bytes=sum(_head_bytes(build.layout.beton_file(file["number"])) for file in files),
        files=len(files),
    )
    return _pass(ran, asked, ended), written


def _repeated(chosen: list[Member], begin: int, count: int) -> list[Member]:
    return [chosen[(begin + place) % len(chosen)] for place in range(count)]


def _group_task(build: Build, group: Group) -> GroupTask:
    return GroupTask(group, build.label_limit, build.captions, build.layout.out, build.settings.build, build.image_options, copy=True)


def _write_groups(tasks: list[GroupTask]) -> tuple[Ran, list[Marker]]:
    return _ran(write_group, tasks, [sum(member.shard.bytes for member in task.group.members) for task in tasks])


def _ran(function: Callable[[Any], Marker], tasks: Sequence[Any], sizes: list[int]) -> tuple[Ran, list[Marker]]:
    """In a process of a pass: do the tasks one by one."""
    works, markers = [], []
    with install_listener("numba:compile", TimingListener()) as compiling:
        began = time.monotonic()
        for task, size in zip(tasks, sizes, strict=True):
            begin = time.perf_counter()
            markers.append(function(task))
            works.append(Work(time.perf_counter() - begin, size))
        ended = time.monotonic()
    ready = sys.modules.get("preprocess.ready")  # of the server from which this process was forked
    compiled = compiling.done or (ready is not None and ready.compiling.done)
    return Ran(began, ended, works[0], works[1:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, compiled), markers


def _side_by_side(function: Callable[[Any], Any], tasks: list[Any]) -> tuple[list[Any], float, float]:
    """A process for each task, this one if there is only one; what they gave, and when the pass began and ended."""
    asked = time.monotonic()
    return list(run_tasks(function, tasks, len(tasks))), asked, time.monotonic()


def _pass(ran: list[Ran], asked: float, ended: float) -> Pass:
    if len(ran) == 1:
        return Pass(ran, 0.0)
    return Pass(ran, fmean(one.began for one in ran) - asked + ended - max(one.ended for one in ran))


def _built(build: Build, chosen: list[Shard], labelled: list[Marker]) -> Built:
    layout = build.layout
    labels = [path for shard in chosen for path in (layout.label_file(shard.name), layout.count_file(shard.name))]
    return Built(
        names=[shard.name for shard in chosen],
        source_bytes=sum(shard.bytes for shard in chosen),
        rows=sum(marker["rows"] for marker in labelled),
        left_out=sum(sum(marker["reasons"].values()) for marker in labelled),
        label_bytes=sum(path.stat().st_size for path in labels),
        table_bytes=layout.idf_parquet.stat().st_size + layout.idf_duckdb.stat().st_size,
    )


def _head_bytes(path: Path) -> int:
    header = np.fromfile(path, beton.HEADER, 1)[0]
    return beton.first_page_offset(int(header["num_samples"]), int(header["page_size"]))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _summing_seconds(counts: list[Path], build: Build) -> float:
    """Seconds that the sum of the counts takes for each shard more."""
    memory, vocabulary = build.settings.build.duckdb_memory, len(build.tokenizer.tokens)
    spill = build.layout.out / "spill.partial"
    once, often = (_seconds(lambda files=counts * times: sum_counts(files, vocabulary, memory, spill)) for times in (1, _TIMES_SUMMED))
    return max(often - once, 0.0) / (len(counts) * (_TIMES_SUMMED - 1))
