"""The two passes over the shards, labels and betons; each skips what its markers say is done."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from labels.errors import UserError
from labels.files import is_remote
from labels.layout import Layout
from labels.manifest import ShardPart
from preprocess.beton_job import GroupTask, write_group
from preprocess.beton_plan import Group, Member
from preprocess.engine import run_tasks
from preprocess.inputs.shards import Shard
from preprocess.label_job import LabelTask, label_shard
from preprocess.plan import Build, ImageFolder, Marker, file_sizes, image_folder, read_summaries
from preprocess.progress import Meter

Task = TypeVar("Task")


def label_pass(build: Build, shards: list[Shard], mine: list[Shard], fresh: frozenset[str] = frozenset()) -> list[Marker]:
    """Label files for the shards that are `mine` (an array job's share, or all); markers of the finished ones, in the shards' order.

    `fresh`: names of shards that the manifest of OUT does not speak of; it is taken away before any other's files are changed.
    """
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
    if any(task.shard.name not in fresh for task in todo):
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
            mend="name all shards of this OUT (`preprocess append` remembers them), give another --out, or --overwrite; "
            "files that are not from here have to be moved away",
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


def beton_pass(build: Build, groups: list[Group], mine: list[Group], fresh: frozenset[str] = frozenset(), *, copy: bool) -> list[Marker]:
    """Betons, or without `copy` files of places, for the groups that are `mine`; markers of the finished ones, in the groups' order.

    `fresh`: as in `label_pass`.
    """
    layout, folder = build.layout, image_folder(build.layout, copy=copy)
    known = read_summaries(folder.markers, [f"{group.first:05d}" for group in groups])
    sizes = file_sizes(folder.files)
    done: dict[int, Marker] = {}
    tasks = []
    for group in groups:
        task = GroupTask(group, build.label_limit, build.captions, layout.out, build.settings.build, build.image_options, copy)
        marker = known.get(f"{group.first:05d}")
        if (
            marker
            and task.wanted.items() <= marker.items()
            and all(sizes.get(f"{file['number']:05d}{folder.suffix}") == file["bytes"] for file in marker["files"])
        ):
            done[group.first] = marker
        else:
            tasks.append(task)
            if marker:  # of other groups: it may not vouch for what is written over its files
                task.marker.unlink(missing_ok=True)
    _remove_surplus(folder, groups)
    chosen = {group.first for group in mine}
    tasks = [task for task in tasks if task.group.first in chosen]
    if any(member.part.name not in fresh for task in tasks for member in task.group.members):
        layout.manifest.unlink(missing_ok=True)
    stage = "betons" if copy else "places"
    with Meter(stage, sum(group.files for group in groups), sum(len(marker["files"]) for marker in done.values())) as meter:
        for marker in run_pass(build, write_group, tasks):
            done[marker["first"]] = marker
            meter.advance(sum(file["samples"] for file in marker["files"]), len(marker["files"]))
    return [done[group.first] for group in groups if group.first in done]


def _remove_surplus(folder: ImageFolder, groups: list[Group]) -> None:
    """What an earlier plan with more betons left behind, and markers that begin no group."""
    firsts, files = {group.first for group in groups}, sum(group.files for group in groups)
    for number, path in folder.numbered():
        if number >= files or (path.suffix == ".json" and number not in firsts):
            path.unlink(missing_ok=True)


def members(shards: list[Shard], parts: list[ShardPart], markers: list[Marker], first: int = 0) -> list[Member]:
    """Those of the shards that have rows, for `plan_groups`; a shard's bytes count as far as its rows are in the subset.

    `first`: number of the first shard. A CSV tells nothing of its images' bytes.
    """
    found = []
    for number, (shard, part, marker) in enumerate(zip(shards, parts, markers, strict=True), start=first):
        held = 0 if shard.kind == "csv" else shard.bytes
        if part.rows:
            found.append(Member(shard, part, number, held * part.rows // (part.rows + marker["outside_subset"])))
    return found
