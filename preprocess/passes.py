"""The two passes over the shards and the counting between them; each skips what its markers say is done."""

import shutil
from collections import Counter
from pathlib import Path

from labels.errors import UserError
from labels.files import fingerprint, sha256_file, write_json
from labels.layout import Layout
from labels.manifest import ShardPart
from preprocess.beton_job import BetonTask, write_beton
from preprocess.counts import document_frequencies, write_idf_duckdb, write_idf_parquet
from preprocess.engine import run_tasks
from preprocess.label_job import LabelTask, label_shard
from preprocess.plan import Build, Marker, beton_numbers, read_marker
from preprocess.progress import Meter
from preprocess.shards import Shard


def label_pass(build: Build, shards: list[Shard]) -> list[Marker]:
    """Label files for all shards; markers in the shards' order."""
    markers: dict[str, Marker] = {}
    todo = []
    for shard in shards:
        marker = read_marker(build.layout.label_marker(shard.name))
        wanted = {"options": build.label_options, "source": shard.source}
        if marker and wanted.items() <= marker.items() and build.layout.label_file(shard.name).is_file():
            markers[shard.name] = marker
        else:
            todo.append(LabelTask(shard, build.layout.out, build.settings.labels, build.label_options))
    _refuse_strangers(build.layout, shards)
    if todo:
        build.layout.manifest.unlink(missing_ok=True)
    with Meter("labels", len(shards), len(markers)) as meter:
        for marker in run_tasks(label_shard, todo, build.workers):
            markers[marker["shard"]] = marker
            meter.advance(marker["rows"])
    return [markers[shard.name] for shard in shards]


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
        reasons = Counter(reason for _, reason, _ in marker["faults"])
        parts.append(
            ShardPart(
                name=shard.name,
                source=Path(shard.path).name,
                source_bytes=shard.bytes,
                first_index=first,
                rows=marker["rows"],
                labels_sha256=marker["sha256"],
                quarantined=dict(sorted(reasons.items())),
            )
        )
        first += marker["rows"]
    return parts


def write_idf(build: Build, parts: list[ShardPart]) -> int:
    """idf.parquet and idf.duckdb, made anew unless they belong to exactly these label files; the number of captions."""
    layout, tokenizer, formula = build.layout, build.tokenizer, build.settings.labels.idf
    captions = sum(part.rows for part in parts)
    marker_path = layout.markers / "idf.json"
    wanted = {"formula": formula, "shards": fingerprint([part.model_dump() for part in parts])}
    marker = read_marker(marker_path)
    if marker and marker.get("of") == wanted and layout.idf_parquet.is_file() and layout.idf_duckdb.is_file():
        return captions
    marker_path.unlink(missing_ok=True)
    spill = layout.out / "spill.partial"
    files = [layout.label_file(part.name) for part in parts]
    frequency, counted = document_frequencies(files, len(tokenizer.tokens), build.settings.build.duckdb_memory, spill)
    shutil.rmtree(spill, ignore_errors=True)
    if counted != captions:
        raise UserError(f"the label files hold {counted} rows, their markers say {captions}", mend=f"run `preprocess verify {layout.out}`")
    write_idf_parquet(layout.idf_parquet, tokenizer.tokens, frequency, captions, formula)
    write_idf_duckdb(layout, captions=captions, formula=formula, tokenizer=tokenizer.name, fingerprint=tokenizer.fingerprint, shards=parts)
    write_json(marker_path, {"of": wanted, "sha256": sha256_file(layout.idf_parquet)})
    return captions


def beton_pass(build: Build, shards: list[Shard], parts: list[ShardPart]) -> list[Marker]:
    """One beton a shard that has rows; markers in the betons' order."""
    markers: dict[int, Marker] = {}
    tasks = []
    with_rows = [(shard, part) for shard, part in zip(shards, parts, strict=True) if part.rows]
    for number, (shard, part) in enumerate(with_rows):
        task = BetonTask(
            shard,
            number,
            part.first_index,
            part.labels_sha256,
            build.settings.labels.context,
            build.layout.out,
            build.settings.build,
            build.image_options,
        )
        marker = read_marker(build.layout.beton_marker(number))
        if marker and task.wanted.items() <= marker.items() and build.layout.beton_file(number).is_file():
            markers[number] = marker
        else:
            tasks.append(task)
    for number in beton_numbers(build.layout):
        if number >= len(with_rows):
            build.layout.beton_marker(number).unlink(missing_ok=True)
            build.layout.beton_file(number).unlink(missing_ok=True)
    if tasks:
        build.layout.manifest.unlink(missing_ok=True)
    with Meter("betons", len(with_rows), len(markers)) as meter:
        for marker in run_tasks(write_beton, tasks, build.workers):
            markers[marker["number"]] = marker
            meter.advance(marker["samples"])
    return [markers[number] for number in range(len(with_rows))]
