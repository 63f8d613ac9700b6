"""`preprocess append`: add shards to a finished output folder; existing rows and betons do not change.

    new shards, their names after all old ones -> done/inputs.json -> the stages of a build, which skip the old shards
               -> IDF summed again from all counts -> quarantine, manifest

A row's position is its identity, so new names must sort after all old ones. The old manifest is valid until the IDF
table changes: until then `--undo` works, afterwards the append can only be finished, by `preprocess append out`.
"""

from dataclasses import replace
from pathlib import Path

from labels.config import load_pipeline
from labels.locks import only_writer
from labels.manifest import Manifest, read_manifest
from labels.settings import Pipeline
from labels.storage import Layout, UserError
from preprocess.betons.plan import image_folder
from preprocess.build import check_images, chosen_uids, complete, make_build
from preprocess.readers.shards import Shard, find_shards, valid_name
from preprocess.stage import BuildInputs, check_same_options, read_inputs, remove_leftovers, write_inputs


def append_shards(out: Path, sources: list[str], overrides: list[str], *, prefix: str = "") -> Manifest:
    """Add the shards of `sources` to a finished output folder, or finish an earlier append; known shards are skipped.

    The folder's config.yaml is the configuration; `overrides`, `section.key=value`, cannot change the options that
    decide what is in the folder. `prefix` is put before the names of the new shards.

    Raises:
        UserError: the folder is not finished or has other options; a name is taken or sorts before an old one.
    """
    layout = Layout(out)
    _known_inputs(layout)  # before a lock file is made in what is no output folder
    shards = find_shards(sources).shards if sources else []
    with only_writer(layout.lock):
        inputs = _known_inputs(layout)
        settings = load_pipeline(layout.config, overrides)
        added = _new_shards(inputs, [replace(shard, name=valid_name(prefix + shard.name)) for shard in shards])
        check_images(added, inputs.images)
        remove_leftovers(layout)
        build = make_build(layout, settings, _same_subset(layout, settings, [shard.path for shard in inputs.shards]))
        check_same_options(build, alone=False)
        if added:
            inputs = BuildInputs(inputs.images, [*inputs.batches, added])
            write_inputs(layout, inputs)
        return complete(build, inputs, _fresh_names(layout, inputs))


def undo_append(out: Path) -> int:
    """Remove what an unfinished append has written; return the number of its shards.

    Raises:
        UserError: there is no manifest: the append can only be finished.
    """
    layout = Layout(out)
    _known_inputs(layout)
    with only_writer(layout.lock):
        manifest, inputs = read_manifest(out), _known_inputs(layout)
        fresh = _fresh_names(layout, inputs)
        for name in fresh:
            for path in (layout.label_marker(name), layout.label_file(name), layout.count_file(name)):
                path.unlink(missing_ok=True)
        for number, path in image_folder(layout, copy=inputs.images == "betons").numbered():
            if number >= len([*manifest.betons, *manifest.image_index]):
                path.unlink(missing_ok=True)
        remove_leftovers(layout)
        kept = [[shard for shard in batch if shard.name not in fresh] for batch in inputs.batches]
        write_inputs(layout, replace(inputs, batches=[batch for batch in kept if batch]))
        return len(fresh)


def _known_inputs(layout: Layout) -> BuildInputs:
    """The shards of an output folder; an append that was killed may have removed its manifest."""
    inputs = read_inputs(layout)
    if inputs is None or len(inputs.batches) == 1:
        read_manifest(layout.out)  # refuses a folder that is missing or not finished
    if inputs is None:
        raise UserError(
            f"{layout.record} is missing or damaged: which shards {layout.out} was made from is not known",
            fix=f"run `preprocess build-labels DATA --out {layout.out}` once with its DATA, then append",
        )
    return inputs


def _fresh_names(layout: Layout, inputs: BuildInputs) -> frozenset[str]:
    """Names of the shards that the manifest does not list; none if there is no manifest to keep."""
    if not layout.manifest.is_file():
        return frozenset()
    listed = {part.name for part in read_manifest(layout.out).shards}
    return frozenset(shard.name for shard in inputs.shards if shard.name not in listed)


def _new_shards(inputs: BuildInputs, shards: list[Shard]) -> list[Shard]:
    """The shards that the output folder lacks; their names must sort after all old ones."""
    by_path, by_name = {shard.path: shard for shard in inputs.shards}, {shard.name: shard for shard in inputs.shards}
    last = inputs.shards[-1].name
    added = []
    for shard in shards:
        known = by_path.get(shard.path)
        if known and known.source != shard.source:
            raise UserError(
                f"{shard.path} has changed since it was built into this output folder as shard {known.name}",
                fix="run build-labels with all DATA of this output folder, which makes its files again",
            )
        if known:
            continue
        if taken := by_name.get(shard.name):
            problem = f"{shard.path} would be shard {shard.name}, which this output folder has from {taken.path}"
        elif f"{shard.name}.parquet" < f"{last}.parquet":
            problem = f"{shard.path} would be shard {shard.name}, before {last}: old rows would lose their positions"
        else:
            added.append(shard)
            continue
        prefix = _prefix_after(last, len(inputs.batches))
        raise UserError(problem, allowed=f"names that come after {last}", fix=f"add `--prefix {prefix}`")
    return added


def _prefix_after(last: str, batches: int) -> str:
    return next(
        prefix for letter in ("more", "x", "zz", "~", chr(0x10FFFF)) if (prefix := f"{letter}{batches}-") > last
    )


def _same_subset(layout: Layout, settings: Pipeline, sources: list[str]) -> str | None:
    """As `chosen_uids`, for an append. An SQL condition selects from the metadata of build-labels, so it must be in
    `build.metadata`.
    """
    subset = settings.build.subset
    if subset and not subset.endswith((".npy", ".parquet")) and settings.build.metadata is None:
        raise UserError(
            f"the subset of {layout.out} is the condition {subset!r} on the metadata of its first DATA alone",
            fix="build the new shards into another output folder (`preprocess idf` sums the IDF tables of several)",
        )
    return chosen_uids(sources, layout, settings)
