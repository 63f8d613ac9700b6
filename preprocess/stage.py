"""The stages of a build, each resumable: markers say what is finished, and a rerun runs only what is missing.

    done/<stage>/<name>.json   one marker for each finished task: its files are whole, made from this input with these options
    run_stage: tasks -> read their markers, compare -> run what is missing in workers -> markers of all finished tasks

A worker removes the marker of its task before it writes the task's files, and writes the new one after them.
manifest.json says that the whole output folder is finished: `remove_manifest` removes it before any file that it names
may change.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from labels.manifest import FORMAT_VERSION, BetonPart
from labels.settings import Pipeline
from labels.storage import (
    Layout,
    UserError,
    disk_errors,
    fingerprint,
    is_remote,
    own_partials,
    remove_partials,
    write_json,
)
from labels.tokenizers.tokenizer import Tokenizer
from preprocess.betons.plan import image_folder
from preprocess.engine import Meter, run_tasks
from preprocess.readers.caption_key import Choice
from preprocess.readers.shards import Shard

_MARKERS_PER_REQUEST = 1_000
_IMAGE_KEYS = {
    "images",
    "jpeg_quality",
    "jpeg_subsampling",
    "max_pixels",
    "decode_check",
    "beton_samples",
    "beton_size",
    "shuffle_window",
    "shuffle_seed",
}


@dataclass(frozen=True)
class BuildContext:
    """What all stages of one build share.

    Attributes:
        layout: paths below the output folder.
        settings: resolved configuration.
        tokenizer: of `settings`.
        workers: processes.
        captions: where a sample's caption is looked for.
        subset: fingerprint of the chosen uids, None for all samples.
    """

    layout: Layout
    settings: Pipeline
    tokenizer: Tokenizer
    workers: int
    captions: tuple[Choice, ...]
    subset: str | None

    @property
    def label_limit(self) -> int:
        """K: most labels that a row can have; n tokens have n - 1 pairs."""
        context = self.settings.labels.context
        return context if self.settings.labels.ngrams == 1 else 2 * context - 1

    @property
    def options(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result, for the manifest and for messages."""
        return {
            "format": FORMAT_VERSION,
            "labels": self.settings.labels.model_dump(),
            "tokenizer": self.tokenizer.fingerprint,
            "caption_key": self.settings.build.caption_key,
            "subset": self.subset,
            "images": self.settings.build.model_dump(include=_IMAGE_KEYS),
        }

    @property
    def label_options(self) -> str:
        """Fingerprint of what decides the rows of one shard: without the IDF formula and the word pairs, which all
        shards decide, and without the tokenizer's path, since the tokenizer's own fingerprint covers its files, stop
        words and WordNet.
        """
        corpus = {"idf", "ngrams", "ngram_classes", "ngram_min_count", "tokenizer", "wordnet", "stop_words"}
        labels = {key: value for key, value in self.options["labels"].items() if key not in corpus}
        return fingerprint({**self.options, "labels": labels, "images": None})

    @property
    def image_options(self) -> str:
        """Fingerprint of what decides the bytes of betons, given the label files."""
        return fingerprint({"format": FORMAT_VERSION, "images": self.options["images"]})


# Markers


class Marker(BaseModel):
    """What a finished task writes down. A file that is damaged or of another form counts as no marker: the task runs
    again.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    @property
    def name(self) -> str:
        """Of its file, without `.json`: the task's."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        """Label rows, or samples with an image, in the task's files."""
        raise NotImplementedError


class LabelMarker(Marker):
    """One shard's label file and count file are whole.

    Attributes:
        options: `BuildContext.label_options`; source: path, bytes and time of the shard.
        rows, tokens: label rows and their token ids; None in markers of earlier versions.
        outside_subset: samples with a caption that the subset does not name.
        sha256: of the label file; keys_sha256: of its keys; count_bytes: length of the count file.
        reasons: reason -> rejected samples.
        pairs: SHA-256 of the pairs.parquet whose classes are in the rows; None where there are none.
    """

    options: str
    source: dict[str, str | int]
    shard: str
    rows: int
    tokens: int | None = None
    outside_subset: int
    sha256: str
    count_bytes: int
    keys_sha256: str
    reasons: dict[str, int]
    pairs: str | None = None

    @property
    def name(self) -> str:
        return self.shard

    @property
    def samples(self) -> int:
        return self.rows


class GroupMarker(Marker):
    """The betons of one group of shards, or its image index files, are whole.

    Attributes:
        options: `BuildContext.image_options`; first, count, shards: the group, see beton_plan.Group.
        files: what the manifest says of each file.
        reasons: reason -> rejected images.
    """

    options: str
    first: int
    count: int
    shards: list[list[Any]]
    files: list[BetonPart]
    reasons: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.first:05d}"

    @property
    def samples(self) -> int:
        return sum(file.samples for file in self.files)


class CorpusMarker(Marker):
    """What is made from all shards is whole: idf.parquet and idf.duckdb, or pairs.parquet.

    Attributes:
        of: fingerprints and options of what it was made from.
        sha256: of the Parquet file.
    """

    of: dict[str, str | int]
    sha256: str


M = TypeVar("M", bound=Marker)


def read_marker(path: Path, kind: type[M]) -> M | None:
    """The marker at `path`; None if the task is not finished or the marker is damaged."""
    try:
        return _parse(path.read_bytes(), kind)
    except FileNotFoundError:
        return None


def read_markers(folder: Path, names: Sequence[str], kind: type[M]) -> dict[str, M]:
    """Name -> marker of those of `names` that have one in `folder`; many at a time from an object store."""
    if not is_remote(folder):
        markers = ((name, read_marker(folder / f"{name}.json", kind)) for name in names)
        return {name: marker for name, marker in markers if marker}
    listed = file_sizes(folder)
    names_by_path = {(folder / f"{name}.json").path: name for name in names if f"{name}.json" in listed}  # type: ignore[attr-defined]  # a UPath
    paths, read = sorted(names_by_path), {}
    for start in range(0, len(paths), _MARKERS_PER_REQUEST):
        contents = folder.fs.cat(paths[start : start + _MARKERS_PER_REQUEST], on_error="omit")  # type: ignore[attr-defined]  # a UPath
        for path, content in contents.items():
            if marker := _parse(content, kind):
                read[names_by_path[path]] = marker
    return read


def _parse(content: bytes, kind: type[M]) -> M | None:
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        return None


def write_marker(path: Path, marker: Marker, faults: list[list[str]] | None = None) -> None:
    """Write a marker in one step, with the rejected samples: these stay in the file, since they may need more memory
    than there is.
    """
    content = marker.model_dump(exclude_none=True)
    write_json(path, content if faults is None else {**content, "faults": faults})


def read_faults(path: Path) -> list[list[str]]:
    """The rejected samples that a marker lists: key, reason and detail, in a group's marker after the shard."""
    return (_read_json(path) or {}).get("faults", [])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# Stages


class Task(Protocol[M]):  # type: ignore[misc]  # M is in is_done alone, but T of Stage takes it as it is
    """One unit of work, picklable."""

    @property
    def name(self) -> str:
        """Of its marker."""
        ...

    @property
    def shards(self) -> Collection[str]:
        """Names of the shards whose rows its files hold."""
        ...

    @property
    def file_count(self) -> int:
        """How many files it makes, for progress."""
        ...

    def is_done(self, marker: M, sizes: Mapping[str, int]) -> bool:
        """Whether the files that `marker` names are what this task would make. `sizes`: path below the output folder ->
        bytes.
        """
        ...


@dataclass(frozen=True)
class CorpusTask:
    """What is made from all shards, by one task in this process.

    Attributes:
        name: of its marker.
        of: what its marker has to say; keep: whatever the marker says, what is there is kept.
        shards: names of all shards.
        files: paths below the output folder that have to be there.
    """

    name: str
    of: Mapping[str, str | int]
    shards: list[str]
    files: tuple[str, ...]
    keep: bool = False
    file_count: int = 1

    def is_done(self, marker: CorpusMarker, sizes: Mapping[str, int]) -> bool:
        return (self.keep or marker.of == self.of) and all(file in sizes for file in self.files)


T = TypeVar("T", bound=Task[Any])


@dataclass(frozen=True)
class Stage(Generic[T, M]):
    """What the tasks of a stage have in common.

    Attributes:
        title: for progress; None: the work is one task for all shards, done in this process.
        work: called in a worker with each task: writes its files, then its marker, and returns the marker.
        marker: the class of its markers.
        markers: their folder.
        outputs: folders in which the tasks' files are.
    """

    title: str | None
    work: Callable[[T], M]
    marker: type[M]
    markers: Path
    outputs: Sequence[Path]


def run_stage(
    build: BuildContext,
    stage: Stage[T, M],
    tasks: Sequence[T],
    *,
    mine: Collection[str] | None = None,
    fresh: frozenset[str] = frozenset(),
    prepare: Callable[[list[str]], None] | None = None,
) -> list[M]:
    """Run the tasks that are not done; return the markers of all that are done then, in the tasks' order.

    Args:
        build: the build.
        stage: the stage.
        tasks: all tasks of the stage.
        mine: names of the tasks that this process may run, None for all: the share of an array job.
        fresh: names of shards that the manifest does not list. It is removed before a file of any other shard changes.
        prepare: called before the work with the names of the tasks whose marker is of other input or options.
    """
    layout = build.layout
    markers = read_markers(stage.markers, [task.name for task in tasks], stage.marker)
    sizes = {
        name if folder == layout.out else f"{folder.name}/{name}": size
        for folder in stage.outputs
        for name, size in file_sizes(folder).items()
    }
    done = {
        task.name: markers[task.name]
        for task in tasks
        if task.name in markers and task.is_done(markers[task.name], sizes)
    }
    own = [task for task in tasks if mine is None or task.name in mine]
    missing = [task for task in own if task.name not in done]
    if any(shard not in fresh for task in missing for shard in task.shards):
        remove_manifest(layout)
    if prepare:
        prepare([name for name in markers if name not in done])
    if stage.title is None:
        done.update((task.name, stage.work(task)) for task in missing)
    else:
        counts = {task.name: task.file_count for task in own}
        with Meter(
            stage.title, sum(counts.values()), sum(counts[name] for name in counts.keys() & done.keys())
        ) as meter:
            options_file = None if is_remote(layout.out) else layout.markers / "options.json"
            for marker in run_tasks(stage.work, missing, build.workers, build.settings.build.engine, options_file):
                done[marker.name] = marker
                meter.advance(marker.samples, counts[marker.name])
    return [done[task.name] for task in tasks if task.name in done]


def file_sizes(folder: Path) -> dict[str, int]:
    """Name and size in bytes of all files in `folder`, by one listing; empty if it is not there."""
    if is_remote(folder):
        listing = folder.fs.find(folder.path, maxdepth=1, detail=True)  # type: ignore[attr-defined]  # a UPath
        return {name.rpartition("/")[2]: int(info["size"]) for name, info in listing.items()}
    if not folder.is_dir():
        return {}
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # a temporary file of another member of an array job, renamed since
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


@contextmanager
def spill_folder(layout: Layout) -> Iterator[Path]:
    """Where DuckDB puts what exceeds its memory: in the output folder, or on this machine's disk if that is an object
    store.
    """
    if is_remote(layout.out):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    spill = layout.out / "spill.partial"
    try:
        with disk_errors(spill):
            yield spill
    finally:
        shutil.rmtree(spill, ignore_errors=True)


# The output folder as a whole


def remove_manifest(layout: Layout) -> None:
    """The output folder is not finished from here on: called before any file that the manifest names changes. Nothing
    else removes it.
    """
    layout.manifest.unlink(missing_ok=True)


def remove_build(layout: Layout) -> None:
    """`--overwrite`: remove what builds have written to the output folder, and nothing else."""
    remove_manifest(layout)
    for name in ("options", "idf", "pairs", "subset"):
        (layout.markers / f"{name}.json").unlink(missing_ok=True)
    for path in (layout.idf_parquet, layout.idf_duckdb, layout.quarantine, layout.config, layout.pairs, layout.subset):
        path.unlink(missing_ok=True)
    for marker in (layout.markers / "labels").glob("*.json"):
        layout.label_file(marker.name.removesuffix(".json")).unlink(missing_ok=True)
        layout.count_file(marker.name.removesuffix(".json")).unlink(missing_ok=True)
        marker.unlink()
    for copy in (True, False):
        for _, path in image_folder(layout, copy=copy).numbered():
            path.unlink(missing_ok=True)
    layout.image_sources.unlink(missing_ok=True)
    remove_leftovers(layout)


def remove_leftovers(layout: Layout) -> None:
    """Remove the temporary files of killed processes; only while no other process may write. An object store has none."""
    markers = [layout.markers, *(layout.markers / name for name in ("labels", "beton", "places"))]
    remove_partials(layout.out, layout.labels, layout.counts, layout.betons, layout.image_index, *markers)


def check_same_options(build: BuildContext, *, alone: bool) -> None:
    """Refuse other options than those that the output folder was begun with, once a shard was labelled with them.

    `alone`: no other process may write, so options with which no shard was labelled (they named a missing column) are
        replaced.
    """
    path = build.layout.markers / "options.json"
    before = _read_json(path)
    if before is None or (
        alone and before != build.options and not any((build.layout.markers / "labels").glob("*.json"))
    ):
        with own_partials():  # several members of an array job may write it at the same moment
            write_json(path, build.options)
    elif before != build.options:
        raise UserError(
            f"{build.layout.out} was begun with other options: {'; '.join(_differences(before, build.options))}",
            allowed="the options it was begun with",
            fix="give another --out, or --overwrite to remove what was built there",
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line for key in keys for line in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{path} was {before!r}, is now {now!r}"]


ImageOutput = Literal["betons", "places", "none"]
"""What is made of the images; `places`: image index files."""


@dataclass(frozen=True)
class BuildInputs:
    """done/inputs.json: which shards an output folder was made from, so that more can be added and a damaged file
    rebuilt.

    The manifest names no path of a machine; this file does, as the markers do. `batches`: the shards of build-labels,
    then those of every append.
    """

    images: ImageOutput
    batches: list[list[Shard]]

    @property
    def shards(self) -> list[Shard]:
        return [shard for batch in self.batches for shard in batch]


def write_inputs(layout: Layout, inputs: BuildInputs) -> None:
    """Write inputs.json in one step, if it differs."""
    if read_inputs(layout) != inputs:
        batches = [[asdict(shard) for shard in batch] for batch in inputs.batches]
        write_json(layout.record, {"images": inputs.images, "batches": batches})


def read_inputs(layout: Layout) -> BuildInputs | None:
    """None if there is none, or it is damaged."""
    try:
        content = json.loads(layout.record.read_bytes())
        return BuildInputs(content["images"], [[Shard(**shard) for shard in batch] for batch in content["batches"]])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
