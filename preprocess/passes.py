"""The two passes over the shards, labels and betons; each skips what its markers say is done."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from labels.errors import UserError
from labels.files import is_remote
from labels.layout import Layout
from labels.manifest import ShardPart
from preprocess.beton_job import BetonTask, write_beton
from preprocess.engine import run_tasks
from preprocess.inputs.shards import Shard
from preprocess.label_job import LabelTask, label_shard
from preprocess.plan import Build, Marker, beton_numbers, file_sizes, read_summaries
from preprocess.progress import Meter

Task = TypeVar("Task")


def label_pass(build: Build, shards: list[Shard], mine: list[Shard]) -> list[Marker]:
    """Label files for the shards that are `mine` (an array job's share, or all); markers of the finished ones, in the shards' order."""
    markers: dict[str, Marker] = {}
    todo = []
    chosen = {shard.name for shard in mine}
    known = read_summaries(build.layout.markers / "labels", [shard.name for shard in shards])
    label_sizes, count_sizes = file_sizes(build.layout.labels), file_sizes(build.layout.counts)
    for shard in shards:
        marker = known.get(shard.name)
        wanted = {"options": build.label_options, "source": shard.source}
        there = f"{shard.name}.parquet" in label_sizes
        if marker and wanted.items() <= marker.items() and there and count_sizes.get(f"{shard.name}.parquet") == marker["count_bytes"]:
            markers[shard.name] = marker
        elif shard.name in chosen:
            todo.append(
                LabelTask(shard, build.layout.out, build.settings.labels, build.captions, build.subset is not None, build.label_options)
            )
    _refuse_strangers(build.layout, shards)
    if todo:
        build.layout.manifest.unlink(missing_ok=True)
    with Meter("labels", len(mine), len(mine) - len(todo)) as meter:
        for marker in run_pass(build, label_shard, todo):
            markers[marker["shard"]] = marker
            meter.advance(marker["rows"])
    return [markers[shard.name] for shard in shards if shard.name in markers]


def run_pass(build: Build, function: Callable[[Task], Marker], tasks: list[Task]) -> Iterator[Marker]:
    shared = None if is_remote(build.layout.out) else build.layout.markers / "options.json"
    return run_tasks(function, tasks, build.workers, build.settings.build.engine, shared)


def _refuse_strangers(layout: Layout, shards: list[Shard]) -> None:
    """A row's position is counted through labels/*.parquet: a file of a shard that is no longer given would shift it."""
    expected = {shard.name for shard in shards}
    strangers = sorted(path.stem for path in layout.labels.glob("*.parquet") if path.stem not in expected)
    if strangers:
        raise UserError(
            f"{layout.labels} holds label files of {len(strangers)} shards that are not in the input, the first: {strangers[0]}",
            mend="name all shards of this OUT, give another --out, or --overwrite; files that are not from here have to be moved away",
        )


def shard_parts(shards: list[Shard], markers: list[Marker]) -> list[ShardPart]:
    """The shards as the manifest tells them, with the position of each one's first row."""
    parts, first = [], 0
    for shard, marker in zip(shards, markers, strict=True):
        parts.append(
            ShardPart(
                name=shard.name,
                source=Path(shard.path).name,
                source_bytes=shard.bytes,
                first_index=first,
                rows=marker["rows"],
                labels_sha256=marker["sha256"],
                keys_sha256=marker["keys_sha256"],
                quarantined=marker["reasons"],
            )
        )
        first += marker["rows"]
    return parts


def beton_pass(build: Build, shards: list[Shard], parts: list[ShardPart], mine: list[Shard]) -> list[Marker]:
    """One beton a shard that has rows and is `mine`; markers of the finished ones, in the betons' order."""
    markers: dict[int, Marker] = {}
    tasks = []
    with_rows = [(shard, part) for shard, part in zip(shards, parts, strict=True) if part.rows]
    chosen = {shard.name for shard in mine}
    known = read_summaries(build.layout.markers / "beton", [f"{number:05d}" for number in range(len(with_rows))])
    there = file_sizes(build.layout.betons)
    for number, (shard, part) in enumerate(with_rows):
        task = BetonTask(
            shard,
            number,
            part.first_index,
            part.labels_sha256,
            build.label_limit,
            build.captions,
            build.layout.out,
            build.settings.build,
            build.image_options,
        )
        marker = known.get(f"{number:05d}")
        if marker and task.wanted.items() <= marker.items() and f"{number:05d}.beton" in there:
            markers[number] = marker
        elif shard.name in chosen:
            tasks.append(task)
    for number in beton_numbers(build.layout):
        if number >= len(with_rows):
            build.layout.beton_marker(number).unlink(missing_ok=True)
            build.layout.beton_file(number).unlink(missing_ok=True)
    if tasks:
        build.layout.manifest.unlink(missing_ok=True)
    with Meter("betons", len(markers) + len(tasks), len(markers)) as meter:
        for marker in run_pass(build, write_beton, tasks):
            markers[marker["number"]] = marker
            meter.advance(marker["samples"])
    return [markers[number] for number in sorted(markers)]
