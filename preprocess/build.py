"""`preprocess build-labels`: the passes over the shards and what stands between them.

    find shards -> check OUT -> pass 1: label_job, one a shard -> word pairs (if asked for) -> IDF of the summed counts
                -> pass 2: beton_job, one a group of shards -> quarantine, manifest

A shard whose marker says "made from this tar with these options" is skipped. The manifest comes last. The members of an array job
(`--shard i/n`) do the passes for their shards side by side; a run without `--shard` does what needs all of them.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labels.errors import UserError
from labels.files import own_partials
from labels.layout import Layout
from labels.manifest import Manifest, write_manifest
from labels.places import Source, read_sources, write_sources
from labels.settings import Pipeline
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.beton_plan import Group, plan_groups
from preprocess.corpus import class_names, idf_is_done, pair_pass, spill_folder, write_idf
from preprocess.engine import worker_count
from preprocess.inputs.captions import parse_caption_key
from preprocess.inputs.pictures import is_local_tar
from preprocess.inputs.shards import Shard, find_shards
from preprocess.inputs.subset import resolve_subset
from preprocess.inputs.tableimages import has_images
from preprocess.locks import one_of_many, only_writer
from preprocess.outcome import check_usable, make_manifest, write_config, write_quarantine
from preprocess.passes import beton_pass, label_pass, members, shard_parts
from preprocess.plan import Build, Marker, check_out, check_same_options, image_folder, remove_build, remove_leftovers
from preprocess.record import Images, Record, write_record

Share = tuple[int, int]
"""i, n: every n-th shard from the i-th on, 0 <= i < n."""


def build_labels(
    sources: list[str], out: Path, settings: Pipeline, *, betons: bool, overwrite: bool, share: Share | None = None, no_images: bool = False
) -> Manifest | None:
    """Run or resume a build; return its manifest, or None for an array job's share.

    Args:
        sources: folders, globs, tars, tables; local or URLs.
        out: the OUT folder.
        settings: resolved configuration.
        betons: False stops after the IDF table.
        overwrite: remove what an earlier build with other options left in OUT.
        share: do only the passes, only for these shards; other shares may run at the same time.
        no_images: write where the images lie (labels/places.py) in place of betons.

    Raises:
        UserError: bad input, other options in OUT, too many bad samples, nothing left.
    """
    check_out(out)
    found = find_shards(sources)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    shards = found.shards
    images: Images = "none" if not betons else "places" if no_images else "betons"
    check_images(shards, images)
    layout = Layout(out)
    with _locked(layout, share):
        if share is None:
            remove_leftovers(layout)
            if overwrite:
                remove_build(layout)
        build = make_build(layout, settings, _subset(sources, layout, settings))
        check_same_options(build, alone=share is None)
        record = Record(images, [shards])
        if share is not None:
            _do_share(build, record, share)
            return None
        write_record(layout, record)
        return complete(build, record)


def make_build(layout: Layout, settings: Pipeline, subset: str | None) -> Build:
    """`subset`: fingerprint of the chosen uids."""
    workers, captions = worker_count(settings.build.workers), parse_caption_key(settings.build.caption_key)
    return Build(layout, settings, make_tokenizer(settings.labels), workers, captions, subset)


def complete(build: Build, record: Record, fresh: frozenset[str] = frozenset()) -> Manifest:
    """Do what is not done yet, and write the manifest.

    Args:
        build: under the lock of its OUT, its options checked.
        record: all shards of OUT.
        fresh: names of shards that are added to a finished OUT: its manifest stays until its IDF table has to change.

    Raises:
        UserError: too many bad samples, or nothing left.
    """
    layout, shards, images = build.layout, record.shards, record.images
    labelled = label_pass(build, shards, shards, fresh)
    if build.settings.labels.ngrams > 1:
        labelled = pair_pass(build, labelled, fresh, keep=len(record.batches) > 1)
    parts = shard_parts(shards, labelled)
    bad, outside = _reasons(labelled), sum(marker["outside_subset"] for marker in labelled)
    check_usable(build, bad, sum(part.rows for part in parts), outside, parts)
    if not fresh:
        write_idf(build, parts, labelled)
    written: list[Marker] = []
    if images != "none":
        groups = groups_of(build, record, labelled)
        written = beton_pass(build, groups, groups, fresh, copy=images == "betons")
        bad += _reasons(written)
        check_usable(build, bad, sum(file["samples"] for marker in written for file in marker["files"]), outside, parts)
    captions = write_idf(build, parts, labelled)
    folder = image_folder(layout, copy=images == "betons")
    write_quarantine(layout, parts, [folder.markers / f"{marker['first']:05d}.json" for marker in written])
    write_config(build)
    if images == "places":
        _write_sources(layout, record)
    remove_leftovers(layout)  # of nodes that were lost on the way
    manifest = make_manifest(build, parts, captions, written, len(class_names(build)), copy=images == "betons")
    write_manifest(layout, manifest)
    return manifest


def groups_of(build: Build, record: Record, labelled: list[Marker]) -> list[Group]:
    """The groups of all shards, whose label markers are `labelled`."""
    parts, batches, first = shard_parts(record.shards, labelled), [], 0
    for batch in record.batches:
        here = slice(first, first + len(batch))
        batches.append(members(batch, parts[here], labelled[here], first))
        first += len(batch)
    return plan_groups(batches, build.settings.build)


@contextmanager
def _locked(layout: Layout, share: Share | None) -> Iterator[None]:
    if share is None:
        with only_writer(layout.lock):
            yield
        return
    # What is every share's (subset.npy, options.json) may be written by several at the same moment.
    with one_of_many(layout.lock, *share), own_partials():
        yield


def _subset(sources: list[str], layout: Layout, settings: Pipeline) -> str | None:
    """The chosen uids as OUT/subset.npy; the fingerprint of its content."""
    if settings.build.subset is None:
        return None
    with spill_folder(layout) as spill:
        return resolve_subset(settings.build.subset, settings.build.metadata, sources, layout.subset, settings.build.duckdb_memory, spill)


def check_images(shards: list[Shard], images: Images) -> None:
    """Refuse, before any caption is read, shards whose images cannot be used as `images` says."""
    if images == "none":
        return
    without = next((shard for shard in shards if shard.kind != "tar" and not has_images(shard)), None)
    if without:
        raise UserError(
            f"{without.path} has captions, but no images: neither image bytes nor a column of paths",
            allowed="tables with a column `image` or `jpg` of bytes, or `path` of files",
            mend="add --no-beton to make labels and IDF alone",
        )
    elsewhere = next((shard for shard in shards if images == "places" and not is_local_tar(shard)), None)
    if elsewhere:
        raise UserError(
            f"the images of {elsewhere.path} cannot be read where they lie",
            allowed="with --no-images: uncompressed tars on local disks",
            mend="leave out --no-images, so that they are copied into betons",
        )


def _write_sources(layout: Layout, record: Record) -> None:
    """sources.json; a path that was edited since an earlier batch stays."""
    known = read_sources(layout) if len(record.batches) > 1 and layout.place_sources.is_file() else {}
    write_sources(layout, {shard.name: Source(shard.path, shard.bytes) for shard in record.shards} | known)


def _reasons(markers: list[Marker]) -> Counter[str]:
    total = Counter[str]()
    for marker in markers:
        total.update(marker["reasons"])
    return total


def _do_share(build: Build, record: Record, share: Share) -> None:
    """A share's labels; then its betons, if a run without `--shard` has made the IDF table since; else what to do next."""
    i, n = share
    shards, images = record.shards, record.images
    labelled = label_pass(build, shards, shards[i::n])
    command = "the same command without --shard"
    if len(labelled) < len(shards):
        print(f"labels of {len(labelled)} of {len(shards)} shards are done; when all shares have ended, run {command} and with --no-beton")
        return
    if not idf_is_done(build, shard_parts(shards, labelled)):
        print(f"labels of all {len(shards)} shards are done; now run {command} and with --no-beton, for the IDF table")
    elif images != "none":
        groups = groups_of(build, record, labelled)
        written = beton_pass(build, groups, groups[i::n], copy=images == "betons")
        last = f"; now run {command}, for the manifest" if len(written) == len(groups) else ""
        done, total = sum(len(marker["files"]) for marker in written), sum(group.files for group in groups)
        print(f"{done} of {total} {images} are done{last}")
