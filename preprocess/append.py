"""`preprocess append`: more shards for a finished OUT, without touching what is there.

    new shards, their names behind all old ones -> done/inputs.json -> their label files, counts and betons
                -> IDF summed anew from all counts -> quarantine, manifest

Until the IDF table has to change, the old manifest stands and OUT is what it was. Killed anywhere, `preprocess append OUT` finishes.
"""

from dataclasses import replace
from pathlib import Path

from labels.config import load_pipeline
from labels.errors import UserError
from labels.layout import Layout
from labels.manifest import Manifest, read_manifest
from labels.settings import Pipeline
from preprocess.build import check_images, complete, make_build
from preprocess.corpus import spill_folder
from preprocess.inputs.shards import Shard, find_shards
from preprocess.inputs.subset import resolve_subset
from preprocess.locks import only_writer
from preprocess.plan import check_same_options, image_folder, remove_leftovers
from preprocess.record import Record, read_record, write_record


def append_shards(out: Path, sources: list[str], overrides: list[str], *, prefix: str = "") -> Manifest:
    """Add the shards of `sources` to OUT, or finish what an earlier append has begun.

    Args:
        out: a finished OUT; its own config.yaml is the configuration.
        sources: as for `build_labels`; shards that OUT has already are skipped.
        overrides: `section.key=value`; options that decide what is in OUT cannot differ.
        prefix: put before the names of the new shards.

    Raises:
        UserError: OUT is not finished or was begun with other options; a name that is taken or would come before an old one.
    """
    layout = Layout(out)
    _known(layout)  # before a lock file is made in what is no OUT
    shards = find_shards(sources).shards if sources else []
    with only_writer(layout.lock):
        record = _known(layout)
        settings = load_pipeline(layout.config, overrides)
        added = _new(record, [replace(shard, name=prefix + shard.name) for shard in shards])
        check_images(added, record.images)
        remove_leftovers(layout)
        build = make_build(layout, settings, _same_subset(layout, settings, [shard.path for shard in record.shards]))
        check_same_options(build, alone=False)
        if added:
            record = Record(record.images, [*record.batches, added])
            write_record(layout, record)
        return complete(build, record, _fresh(layout, record))


def undo_append(out: Path) -> int:
    """Give up an append that has not changed the manifest yet: remove what it wrote; the number of shards that are given up.

    Raises:
        UserError: OUT is not finished: the append has come further, and can only be finished.
    """
    layout = Layout(out)
    _known(layout)
    with only_writer(layout.lock):
        manifest, record = read_manifest(out), _known(layout)
        fresh = _fresh(layout, record)
        for name in fresh:
            for path in (layout.label_marker(name), layout.label_file(name), layout.count_file(name)):
                path.unlink(missing_ok=True)
        for number, path in image_folder(layout, copy=record.images == "betons").numbered():
            if number >= len([*manifest.betons, *manifest.places]):
                path.unlink(missing_ok=True)
        remove_leftovers(layout)
        kept = [[shard for shard in batch if shard.name not in fresh] for batch in record.batches]
        write_record(layout, replace(record, batches=[batch for batch in kept if batch]))
        return len(fresh)


def _known(layout: Layout) -> Record:
    """What OUT was made from; an append that was killed may have taken the manifest away."""
    record = read_record(layout)
    begun = record is not None and len(record.batches) > 1
    if not begun:
        read_manifest(layout.out)  # has the words for an OUT that is missing or not finished
    if record is None:
        raise UserError(
            f"{layout.record} is missing or damaged: which shards {layout.out} was made from is not known",
            mend=f"run `preprocess build-labels DATA --out {layout.out}` once with its DATA, then append",
        )
    return record


def _fresh(layout: Layout, record: Record) -> frozenset[str]:
    """Names of the shards that the manifest does not speak of; none if there is no manifest to keep."""
    if not layout.manifest.is_file():
        return frozenset()
    there = {part.name for part in read_manifest(layout.out).shards}
    return frozenset(shard.name for shard in record.shards if shard.name not in there)


def _new(record: Record, shards: list[Shard]) -> list[Shard]:
    """Those of the shards that OUT has not; their names have to come after all that it has."""
    paths, names = {shard.path: shard for shard in record.shards}, {shard.name: shard for shard in record.shards}
    last = record.shards[-1].name
    added = []
    for shard in shards:
        known = paths.get(shard.path)
        if known and known.source != shard.source:
            raise UserError(
                f"{shard.path} has changed since it was built into this OUT as shard {known.name}",
                mend="run build-labels with all DATA of this OUT, which makes its files anew; append only adds",
            )
        if known:
            continue
        if taken := names.get(shard.name):
            problem = f"{shard.path} would be shard {shard.name}, which this OUT has from {taken.path}"
        elif f"{shard.name}.parquet" < f"{last}.parquet":
            problem = f"{shard.path} would be shard {shard.name}, before {last}: the rows of this OUT would lose their positions"
        else:
            added.append(shard)
            continue
        raise UserError(problem, allowed=f"names that come after {last}", mend=f"add `--prefix {_prefix_after(last, len(record.batches))}`")
    return added


def _prefix_after(last: str, batches: int) -> str:
    return next(prefix for letter in ("more", "x", "zz", "~", chr(0x10FFFF)) if (prefix := f"{letter}{batches}-") > last)


def _same_subset(layout: Layout, settings: Pipeline, sources: list[str]) -> str | None:
    """The fingerprint of the subset's uids, read again: what chose them must choose the same for the new shards.

    An SQL condition chooses among the metadata that build-labels was given, so it serves only where `build.metadata` names all.
    """
    subset = settings.build.subset
    if subset is None:
        return None
    if not subset.endswith((".npy", ".parquet")) and settings.build.metadata is None:
        raise UserError(
            f"the subset of {layout.out} is the condition {subset!r} on the metadata of its first DATA, which says nothing of other shards",
            mend="build the new shards into an OUT of their own (`preprocess idf` sums the IDF tables of several)",
        )
    with spill_folder(layout) as spill:
        return resolve_subset(subset, settings.build.metadata, sources, layout.subset, settings.build.duckdb_memory, spill)
