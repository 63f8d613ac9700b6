"""`preprocess build-labels`: the two passes over the shards and what stands between them.

    find shards -> check OUT -> pass 1: label_job, one a shard -> counts (IDF) -> pass 2: beton_job -> quarantine, manifest

A shard whose marker says "made from this tar with these options" is skipped. The manifest comes last.
"""

from pathlib import Path

from labels.layout import Layout
from labels.manifest import Manifest, write_manifest
from labels.settings import Pipeline
from preprocess.engine import worker_count
from preprocess.lock import only_writer
from preprocess.outcome import check_usable, fault_rows, make_manifest, write_config, write_quarantine
from preprocess.passes import beton_pass, label_pass, shard_parts, write_idf
from preprocess.plan import Build, check_out, check_same_options, remove_build
from preprocess.shards import find_shards
from preprocess.tokenizer import make_tokenizer


def build_labels(sources: list[str], out: Path, settings: Pipeline, *, betons: bool, overwrite: bool) -> Manifest:
    """Run or resume a build; return its manifest.

    Args:
        sources: folders, globs, tars; local or URLs.
        out: the OUT folder.
        settings: resolved configuration.
        betons: False stops after the IDF table.
        overwrite: remove what an earlier build with other options left in OUT.

    Raises:
        UserError: bad input, other options in OUT, too many bad samples, nothing left.
    """
    check_out(out)
    shards = find_shards(sources)
    build = Build(Layout(out), settings, make_tokenizer(settings.labels.tokenizer), worker_count(settings.build.workers))
    with only_writer(build.layout.lock):
        if overwrite:
            remove_build(build.layout)
        check_same_options(build)
        labelled = label_pass(build, shards)
        parts = shard_parts(shards, labelled)
        faults = fault_rows("labels", labelled)
        check_usable(build, faults, sum(part.rows for part in parts))
        captions = write_idf(build, parts)
        written = []
        if betons:
            written = beton_pass(build, shards, parts)
            faults += fault_rows("images", written)
            check_usable(build, faults, sum(marker["samples"] for marker in written))
        write_quarantine(build.layout, faults)
        write_config(build)
        manifest = make_manifest(build, parts, captions, written)
        write_manifest(build.layout, manifest)
    return manifest
