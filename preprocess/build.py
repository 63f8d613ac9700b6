"""`preprocess build-labels`: the passes over the shards and what stands between them.

    find shards -> check OUT -> pass 1: label_job, one a shard -> word pairs (if asked for) -> IDF of the summed counts
                -> pass 2: beton_job, one a shard -> quarantine, manifest

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
from labels.settings import Pipeline
from preprocess.corpus import class_names, idf_is_done, pair_pass, spill_folder, write_idf
from preprocess.engine import worker_count
from preprocess.inputs.captions import parse_caption_key
from preprocess.inputs.shards import Shard, find_shards
from preprocess.inputs.subset import resolve_subset
from preprocess.inputs.tableimages import has_images
from preprocess.lock import one_of_many, only_writer
from preprocess.outcome import check_usable, make_manifest, write_config, write_quarantine
from preprocess.passes import beton_pass, label_pass, shard_parts
from preprocess.plan import Build, check_out, check_same_options, remove_build, remove_leftovers
from preprocess.tokens.tokenizer import make_tokenizer

Share = tuple[int, int]
"""i, n: every n-th shard from the i-th on, 0 <= i < n."""


def build_labels(
    sources: list[str], out: Path, settings: Pipeline, *, betons: bool, overwrite: bool, share: Share | None = None
) -> Manifest | None:
    """Run or resume a build; return its manifest, or None for an array job's share.

    Args:
        sources: folders, globs, tars, tables; local or URLs.
        out: the OUT folder.
        settings: resolved configuration.
        betons: False stops after the IDF table.
        overwrite: remove what an earlier build with other options left in OUT.
        share: do only the passes, only for these shards; other shares may run at the same time.

    Raises:
        UserError: bad input, other options in OUT, too many bad samples, nothing left.
    """
    check_out(out)
    found = find_shards(sources)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    shards = found.shards
    if betons:
        _check_images(shards)
    captions = parse_caption_key(settings.build.caption_key)
    tokenizer = make_tokenizer(settings.labels)
    layout = Layout(out)
    with _locked(layout, share):
        if share is None:
            remove_leftovers(layout)
            if overwrite:
                remove_build(layout)
        subset = _subset(sources, layout, settings)
        build = Build(layout, settings, tokenizer, worker_count(settings.build.workers), captions, subset)
        check_same_options(build)
        mine = shards if share is None else shards[share[0] :: share[1]]
        labelled = label_pass(build, shards, mine)
        if share is not None:
            _finish_share(build, shards, mine, labelled, betons)
            return None
        if settings.labels.ngrams > 1:
            labelled = pair_pass(build, labelled)
        parts = shard_parts(shards, labelled)
        bad = _reasons(labelled)
        outside = sum(marker["outside_subset"] for marker in labelled)
        check_usable(build, bad, sum(part.rows for part in parts), outside, parts)
        count = write_idf(build, parts)
        written = []
        if betons:
            written = beton_pass(build, shards, parts, shards)
            bad += _reasons(written)
            check_usable(build, bad, sum(marker["samples"] for marker in written), outside, parts)
        write_quarantine(layout, parts, len(written))
        write_config(build)
        remove_leftovers(layout)  # of nodes that were lost on the way
        manifest = make_manifest(build, parts, count, written, len(class_names(build)))
        write_manifest(layout, manifest)
    return manifest


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


def _check_images(shards: list[Shard]) -> None:
    """Refuse, before any caption is read, tables whose rows have no images."""
    without = next((shard for shard in shards if shard.kind != "tar" and not has_images(shard)), None)
    if without:
        raise UserError(
            f"{without.path} has captions, but no images: neither image bytes nor a column of paths",
            allowed="tables with a column `image` or `jpg` of bytes, or `path` of files",
            mend="add --no-beton to make labels and IDF alone",
        )


def _reasons(markers: list[dict]) -> Counter[str]:
    total = Counter[str]()
    for marker in markers:
        total.update(marker["reasons"])
    return total


def _finish_share(build: Build, shards: list[Shard], mine: list[Shard], labelled: list[dict], betons: bool) -> None:
    """After a share's labels: its betons, if a run without `--shard` has made the IDF table since; else what to do next."""
    command = "the same command without --shard"
    if len(labelled) < len(shards):
        print(f"labels of {len(labelled)} of {len(shards)} shards are done; when all shares have ended, run {command} and with --no-beton")
        return
    parts = shard_parts(shards, labelled)
    if not idf_is_done(build, parts):
        print(f"labels of all {len(shards)} shards are done; now run {command} and with --no-beton, for the IDF table")
    elif betons:
        written = beton_pass(build, shards, parts, mine)
        total = sum(1 for part in parts if part.rows)
        last = f"; now run {command}, for the manifest" if len(written) == total else ""
        print(f"{len(written)} of {total} betons are done{last}")
