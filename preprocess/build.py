"""`preprocess build-labels`: a build from beginning to end.

    find shards -> check the output folder
    stage 1  labels   label_stage, one task for each shard            labels/ counts/
             pairs    with labels.ngrams = 2: word-pair classes       pairs.parquet, into labels/
             idf      the summed counts of all shards                 idf.parquet idf.duckdb
             betons   group_stage, one task for each group of shards  beton/, or places/ with --no-images
    finalize          quarantine.parquet config.yaml manifest.json

Two passes: labels from captions alone, then betons, since a row's position is known when all earlier shards are
counted, and the IDF table is useful without images. Every stage skips what its markers cover (stage.py). The manifest
comes last. The members of an array job (`--shard i/n`) make labels and betons of their shards at the same time; a run
without `--shard` makes what needs all shards.
"""

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from labels.config import dump_yaml
from labels.locks import one_of_many, only_writer
from labels.manifest import (
    QUARANTINE,
    Manifest,
    ShardPart,
    Source,
    TokenizerPart,
    read_sources,
    write_manifest,
    write_sources,
)
from labels.settings import Pipeline
from labels.show.terminal import count, visible
from labels.storage import Layout, UserError, fingerprint, is_remote, own_partials, printable, sha256_file, write_whole
from labels.subset import resolve_subset
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.betons.plan import Group, Member, image_folder, plan_groups
from preprocess.betons.write import GroupTask, group_stage
from preprocess.counts import sum_counts, write_idf_duckdb, write_idf_parquet
from preprocess.engine import worker_count
from preprocess.ngrams import class_names, run_pair_stages
from preprocess.readers.base import parse_caption_key
from preprocess.readers.images import is_local_tar, without_images
from preprocess.readers.shards import Shard, find_shards
from preprocess.shard import LabelTask, label_stage
from preprocess.stage import (
    BuildContext,
    BuildInputs,
    CorpusMarker,
    CorpusTask,
    GroupMarker,
    ImageOutput,
    LabelMarker,
    Stage,
    check_same_options,
    read_faults,
    remove_build,
    remove_leftovers,
    run_stage,
    spill_folder,
    write_inputs,
    write_marker,
)

_QUARANTINE_ROWS = 65_536
Share = tuple[int, int]
"""i, n: every n-th shard from the i-th on, 0 <= i < n."""


def build_labels(
    sources: list[str],
    out: Path,
    settings: Pipeline,
    *,
    betons: bool,
    overwrite: bool,
    share: Share | None = None,
    no_images: bool = False,
) -> Manifest | None:
    """Run or resume a build; return its manifest, or None for an array job's share.

    Args:
        sources: folders, globs, tars, tables; local or URLs.
        out: the output folder.
        settings: resolved configuration.
        betons: False stops after the IDF table.
        overwrite: remove what an earlier build with other options left in the output folder.
        share: do only the stages of shards, only for these; other shares may run at the same time.
        no_images: write an image index (labels/manifest.py) in place of betons.

    Raises:
        UserError: bad input, an output folder of other options, too many bad samples, no sample left.
    """
    _check_out(out)
    found_shards = find_shards(sources)
    for note in found_shards.notes:
        print(f"note: {visible(note)}", file=sys.stderr)
    inputs = BuildInputs("none" if not betons else "places" if no_images else "betons", [found_shards.shards])
    check_images(inputs.shards, inputs.images)
    layout = Layout(out)
    with _locked(layout, share):
        if share is None:
            remove_leftovers(layout)
            if overwrite:
                remove_build(layout)
        build = make_build(layout, settings, chosen_uids(sources, layout, settings))
        check_same_options(build, alone=share is None)
        if share is not None:
            _run_share(build, inputs, share)
            return None
        write_inputs(layout, inputs)
        return complete(build, inputs)


def make_build(layout: Layout, settings: Pipeline, subset: str | None) -> BuildContext:
    """`subset`: fingerprint of the chosen uids."""
    workers, captions = worker_count(settings.build.workers), parse_caption_key(settings.build.caption_key)
    return BuildContext(layout, settings, make_tokenizer(settings.labels), workers, captions, subset)


def complete(build: BuildContext, inputs: BuildInputs, fresh: frozenset[str] = frozenset()) -> Manifest:
    """Run what is missing of every stage, and finalize the build; its lock is held and its options are checked.

    `fresh`: names of shards that are added to a finished output folder: its manifest stays until the IDF table changes.

    Raises:
        UserError: too many bad samples, or no sample left.
    """
    shards, copy = inputs.shards, inputs.images == "betons"
    labelled = _run_labels(build, shards, fresh=fresh)
    if build.settings.labels.ngrams > 1:
        labelled = run_pair_stages(build, labelled, fresh, keep=len(inputs.batches) > 1)
    parts = shard_parts(shards, labelled)
    rejected, outside = _reasons(labelled), sum(marker.outside_subset for marker in labelled)
    _check_usable(build, rejected, sum(part.rows for part in parts), outside, parts)
    if not fresh:
        write_idf(build, parts, labelled)
    written: list[GroupMarker] = []
    if inputs.images != "none":
        written = _run_groups(build, groups_of(build, inputs, labelled), fresh=fresh, copy=copy)
        rejected += _reasons(written)
        _check_usable(build, rejected, sum(marker.samples for marker in written), outside, parts)
    write_idf(build, parts, labelled)
    manifest = _finalize(build, inputs, parts, labelled, written, copy=copy)
    if damaged := sum(marker.damaged_metadata or 0 for marker in written):
        print(f"images kept with damaged metadata: {damaged:,}")
    return manifest


def _run_labels(
    build: BuildContext, shards: list[Shard], mine: list[Shard] | None = None, fresh: frozenset[str] = frozenset()
) -> list[LabelMarker]:
    """Label files for the shards that are `mine` (None: all); markers of the finished ones, in the shards' order."""
    layout, names = build.layout, {shard.name for shard in shards}
    # The position of a row is counted through labels/*.parquet: the file of a shard that is no longer given would shift
    # it.
    unknown = sorted(path.stem for path in layout.labels.glob("*.parquet") if path.stem not in names)
    if unknown:
        raise UserError(
            f"{layout.labels} holds label files of {count(len(unknown), 'shard')} not in the input, first {unknown[0]}",
            fix="name all shards of this output folder (`preprocess append` remembers them), give another --out, or "
            "--overwrite; files that no build has written have to be moved away",
        )
    settings, options = build.settings.labels, build.label_options
    tasks = [
        LabelTask(shard, layout.out, settings, build.captions, build.subset is not None, options) for shard in shards
    ]
    own = None if mine is None else {shard.name for shard in mine}
    return run_stage(build, label_stage(layout), tasks, mine=own, fresh=fresh)


def _run_groups(
    build: BuildContext,
    groups: list[Group],
    mine: list[Group] | None = None,
    fresh: frozenset[str] = frozenset(),
    *,
    copy: bool,
) -> list[GroupMarker]:
    """Betons, or without `copy` image index files, for the groups that are `mine`; markers of the finished ones, in
    their order.
    """
    layout, folder = build.layout, image_folder(build.layout, copy=copy)
    settings, options = build.settings.build, build.image_options
    tasks = [
        GroupTask(group, build.label_limit, build.captions, layout.out, settings, options, copy) for group in groups
    ]
    begins, count = {group.first for group in groups}, sum(group.files for group in groups)

    def remove_outdated(stale: list[str]) -> None:
        """Files beyond the last beton, and markers of other groups: the files that these name may be overwritten by
        other tasks.
        """
        for name in stale:
            (folder.markers / f"{name}.json").unlink(missing_ok=True)
        for number, path in folder.numbered():
            if number >= count or (path.suffix == ".json" and number not in begins):
                path.unlink(missing_ok=True)

    chosen = None if mine is None else {f"{group.first:05d}" for group in mine}
    return run_stage(build, group_stage(layout, copy=copy), tasks, mine=chosen, fresh=fresh, prepare=remove_outdated)


def write_idf(build: BuildContext, parts: list[ShardPart], labelled: list[LabelMarker]) -> None:
    """idf.parquet and idf.duckdb, unless they are those of exactly these label files."""
    _run_idf(build, parts, labelled, mine=None)


def _run_idf(
    build: BuildContext, parts: list[ShardPart], labelled: list[LabelMarker], mine: Collection[str] | None
) -> list[CorpusMarker]:
    """As `run_stage`: with no name in `mine`, the marker if the table is done."""
    layout, tokenizer, formula = build.layout, build.tokenizer, build.settings.labels.idf
    of = {"formula": formula, "shards": fingerprint([part.model_dump() for part in parts])}

    def sum_counts_to_table(task: CorpusTask) -> CorpusMarker:
        path, names = layout.markers / "idf.json", class_names(build)
        path.unlink(missing_ok=True)
        with spill_folder(layout) as spill:
            files = [layout.count_file(shard) for shard in task.shards]
            frequency = sum_counts(files, len(names), build.settings.build.duckdb_memory, spill)
        captions, tokens = sum(part.rows for part in parts), [marker.tokens for marker in labelled]
        write_idf_parquet(layout.idf_parquet, names, frequency, captions, formula)
        write_idf_duckdb(
            layout,
            captions=captions,
            tokens=None if None in tokens else sum(filter(None, tokens)),
            formula=formula,
            tokenizer=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            shards=parts,
        )
        marker = CorpusMarker(of=dict(task.of), sha256=sha256_file(layout.idf_parquet))
        write_marker(path, marker)
        return marker

    stage = Stage(None, sum_counts_to_table, CorpusMarker, layout.markers, [layout.out])
    files = (layout.idf_parquet.name, layout.idf_duckdb.name)
    return run_stage(build, stage, [CorpusTask("idf", of, [part.name for part in parts], files)], mine=mine)


def shard_parts(shards: list[Shard], labelled: list[LabelMarker]) -> list[ShardPart]:
    """The shards as the manifest lists them, with the position of each one's first row."""
    parts, first = [], 0
    for shard, marker in zip(shards, labelled, strict=True):
        parts.append(
            ShardPart(
                name=shard.name,
                source=printable(Path(shard.path).name),
                source_bytes=shard.bytes,
                first_index=first,
                rows=marker.rows,
                labels_sha256=marker.sha256,
                keys_sha256=marker.keys_sha256,
                quarantined=marker.reasons,
            )
        )
        first += marker.rows
    return parts


def groups_of(build: BuildContext, inputs: BuildInputs, labelled: list[LabelMarker]) -> list[Group]:
    """The groups of all shards, whose label markers are `labelled`."""
    parts, batches, first = shard_parts(inputs.shards, labelled), [], 0
    for batch in inputs.batches:
        of_batch = slice(first, first + len(batch))
        batches.append(members(batch, parts[of_batch], labelled[of_batch], first))
        first += len(batch)
    return plan_groups(batches, build.settings.build)


def members(shards: list[Shard], parts: list[ShardPart], labelled: list[LabelMarker], first: int = 0) -> list[Member]:
    """The shards that have rows, for `plan_groups`; the bytes of a shard count as far as its rows are in the subset.

    `first`: number of the first shard. A CSV says nothing of the bytes of its images.
    """
    with_rows = []
    for number, (shard, part, marker) in enumerate(zip(shards, parts, labelled, strict=True), start=first):
        size = 0 if shard.kind == "csv" else shard.bytes
        if part.rows:
            with_rows.append(Member(shard, part, number, size * part.rows // (part.rows + marker.outside_subset)))
    return with_rows


@contextmanager
def _locked(layout: Layout, share: Share | None) -> Iterator[None]:
    if share is None:
        with only_writer(layout.lock):
            yield
        return
    # Several shares may write subset.npy and options.json at the same moment.
    with one_of_many(layout.lock, *share), own_partials():
        yield


def _run_share(build: BuildContext, inputs: BuildInputs, share: Share) -> None:
    """The labels of a share and, if the IDF table exists, its betons; print the next command."""
    i, n = share
    shards, images = inputs.shards, inputs.images
    labelled = _run_labels(build, shards, shards[i::n])
    finish = "run the same command with --no-beton instead of --shard"
    if len(labelled) < len(shards):
        done = f"labels of {len(labelled):,} of {count(len(shards), 'shard')} are done"
        print(f"{done}; after the last share, {finish}")
        return
    if not _run_idf(build, shard_parts(shards, labelled), labelled, mine=()):
        print(f"labels of all {len(shards)} shards are done; now {finish}, for the IDF table")
    elif images != "none":
        groups = groups_of(build, inputs, labelled)
        written = _run_groups(build, groups, groups[i::n], copy=images == "betons")
        last = "; now run the same command without --shard, for the manifest" if len(written) == len(groups) else ""
        done, total = sum(len(marker.files) for marker in written), sum(group.files for group in groups)
        print(f"{done} of {total} {'betons' if images == 'betons' else 'image index files'} are done{last}")


def _check_out(out: Path) -> None:
    """Refuse, before any work, an output folder that cannot be written or that DuckDB could not name."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", allowed="an existing or a new folder", fix="give another --out")
    path, odd = (str(out), "*?[") if is_remote(out) else (str(out.resolve()), "?\\")
    if characters := sorted(set(odd) & set(path)):
        raise UserError(
            f"the path {path} holds {' '.join(characters)}, which DuckDB takes for a pattern or a folder",
            fix="give --out a path without it",
        )


def check_images(shards: list[Shard], images: ImageOutput) -> None:
    """Refuse, before any caption is read, shards whose images cannot be used as `images` says."""
    if images == "none":
        return
    for shard in shards:
        if shard.kind != "tar" and (error := without_images(shard)):
            raise error
    elsewhere = next((shard for shard in shards if images == "places" and not is_local_tar(shard)), None)
    if elsewhere:
        raise UserError(
            f"the images of {elsewhere.path} cannot be read in place",
            allowed="with --no-images: uncompressed tars on local disks",
            fix="run without --no-images, so that the images are copied into betons",
        )


def chosen_uids(sources: list[str], layout: Layout, settings: Pipeline) -> str | None:
    """Write the chosen uids to subset.npy; return the fingerprint of its content."""
    options = settings.build
    if options.subset is None:
        return None
    with spill_folder(layout) as spill:
        return resolve_subset(options.subset, options.metadata, sources, layout.subset, options.duckdb_memory, spill)


# -- the end of a build


def _reasons(markers: Sequence[LabelMarker | GroupMarker]) -> Counter[str]:
    total = Counter[str]()
    for marker in markers:
        total.update(marker.reasons)
    return total


def _check_usable(
    build: BuildContext, rejected: Counter[str], samples: int, outside: int, parts: list[ShardPart]
) -> None:
    """End the build if too few of the `samples` are left; quarantine.parquet then has the reasons.

    `rejected`: reason -> bad samples, in the subset or not; `outside`: good samples outside of the subset.

    Raises:
        UserError: no sample left, or more bad ones than `max_bad_fraction` of all.
    """
    bad, total = rejected.total(), rejected.total() + samples + outside
    limit = build.settings.build.max_bad_fraction
    if samples and bad <= limit * total:
        return
    if not build.layout.manifest.is_file():  # a finished output folder keeps the table that its manifest names
        _write_quarantine(build.layout, parts)
    reasons = _reason_list(rejected)
    fix = f"see {build.layout.quarantine}{_first_fault(build.layout, parts)}"
    if samples == 0:
        others = f"; {outside} are outside of the subset" if build.subset else ""
        raise UserError(
            f"the input gave no usable sample: {reasons or 'its shards are empty'}{others}",
            allowed="tars with an image (.jpg, .png, ...) and a caption (.txt, or `caption` in .json) for each key; "
            "tables with a caption",
            fix=fix if bad else None,
        )
    raise UserError(
        f"{bad:,} of {count(total, 'sample')} are bad ({bad / total:.1%}): {reasons}",
        allowed=f"build.max_bad_fraction = {limit:.1%}",
        fix=f"{fix}; raise the limit with --set build.max_bad_fraction=...",
    )


def _first_fault(layout: Layout, parts: list[ShardPart]) -> str:
    """What was wrong with the first rejected sample of the label stage, or with its tar, and how to fix it."""
    for part in parts:
        for key, reason, detail in read_faults(layout.label_marker(part.name))[:1] if part.quarantined else []:
            return f" (the first: {part.name}{key and f', {key}'}: {reason}: {detail})"
    return ""


def _reason_list(rejected: Counter[str]) -> str:
    return ", ".join(f"{number} x {reason}" for reason, number in rejected.most_common())


def _finalize(
    build: BuildContext,
    inputs: BuildInputs,
    parts: list[ShardPart],
    labelled: list[LabelMarker],
    written: list[GroupMarker],
    *,
    copy: bool,
) -> Manifest:
    """quarantine.parquet, config.yaml, and last the manifest. `written`: markers of betons (`copy`) or image index
    files.
    """
    layout, settings, tokenizer = build.layout, build.settings, build.tokenizer
    folder = image_folder(layout, copy=copy)
    _write_quarantine(layout, parts, [folder.markers / f"{marker.name}.json" for marker in written])
    deciding = {"paths": True, "train": True, "evaluators": True, "build": {"workers", "engine"}}
    dump_yaml(layout.config, settings, exclude=deciding)
    if inputs.images == "places":
        # A path that was edited since an earlier batch stays.
        known = read_sources(layout) if len(inputs.batches) > 1 and layout.image_sources.is_file() else {}
        write_sources(layout, {shard.name: Source(shard.path, shard.bytes) for shard in inputs.shards} | known)
    remove_leftovers(layout)  # of nodes that were lost on the way
    files = [file for marker in written for file in marker.files]
    unlabelled = [marker.unlabelled for marker in labelled]
    manifest = Manifest(
        fingerprint=fingerprint([build.label_options, [[part.name, part.rows, part.labels_sha256] for part in parts]]),
        options=build.options,
        label_limit=build.label_limit,
        tokenizer=TokenizerPart(
            name=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            path=tokenizer.path,
            vocabulary=len(class_names(build)),
            excluded=tokenizer.excluded.tolist(),
        ),
        captions=sum(part.rows for part in parts),
        unlabelled=None if None in unlabelled else sum(filter(None, unlabelled)),
        idf_formula=settings.labels.idf,
        idf_sha256=sha256_file(layout.idf_parquet),
        quarantine_sha256=sha256_file(layout.quarantine),
        shards=parts,
        betons=files if copy else [],
        image_index=[] if copy else files,
    )
    write_manifest(layout, manifest)
    return manifest


def _write_quarantine(layout: Layout, parts: list[ShardPart], groups: Sequence[Path] = ()) -> None:
    """quarantine.parquet from the markers of the shards and of groups, one marker in memory at a time."""
    sources = [("labels", part.name, layout.label_marker(part.name)) for part in parts if part.quarantined]
    sources += [("images", "", path) for path in groups]

    def write(partial: Path) -> None:
        with pq.ParquetWriter(partial, QUARANTINE, compression="zstd") as writer:
            rows: list[dict[str, str]] = []
            for stage, shard, path in sources:
                for fault in read_faults(path):
                    name, key, reason, detail = fault if stage == "images" else [shard, *fault]
                    rows.append(dict(zip(QUARANTINE.names, (name, key, stage, reason, detail), strict=True)))
                if len(rows) >= _QUARANTINE_ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, QUARANTINE))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, QUARANTINE))

    write_whole(layout.quarantine, write)


def print_summary(manifest: Manifest, out: Path) -> None:
    """What was built, in a few lines on standard output."""
    rejected = Counter[str]()
    for part in [*manifest.shards, *manifest.betons, *manifest.image_index]:
        rejected.update(part.quarantined)
    gib = sum(beton.bytes for beton in manifest.betons) / 2**30
    samples = count(manifest.samples, "sample")
    rows, shards = count(manifest.captions, "label row"), count(len(manifest.shards), "shard")
    print(f"{out}: {rows} from {shards}, vocabulary {manifest.tokenizer.vocabulary:,}")
    if manifest.betons:
        print(f"  {samples} in {count(len(manifest.betons), 'beton')}, {gib:.2f} GiB")
    if manifest.image_index:
        print(f"  {samples} in the tars that {Layout(out).image_sources} names; keep the tars")
    if manifest.unlabelled:
        query = "SELECT key FROM labels WHERE len(label_ids) = 0"
        without = f"{count(manifest.unlabelled, 'caption')} (no word in them is a label; their loss is 0)"
        print(f'  without labels: {without}; list them: preprocess sql {out} "{query}"')
    print(f"  quarantined: {rejected.total():,}" + (f" ({_reason_list(rejected)})" if rejected else ""))
