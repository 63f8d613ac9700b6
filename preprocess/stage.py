"""The stages of a build, each resumable: markers record what is finished, and a rerun runs only what is missing.

    done/<stage>/<name>.json   marker of a finished task: its files are whole, made from this input with these options
    run_stage: tasks -> read their markers, compare -> run what is missing in workers -> markers of all finished tasks

A worker removes the marker of its task before it writes the task's files, and writes the new one after them; `verify`
removes the marker of a file that fails, and the next build makes that file again. manifest.json means that the whole
output folder is finished: `remove_manifest` removes it before any file that it names may change.
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
    library_path,
    own_partials,
    remove_partials,
    write_json,
)
from labels.tokenizers.tokenizer import Tokenizer
from preprocess.betons.plan import image_folder
from preprocess.engine import Meter, run_tasks
from preprocess.readers.base import Choice
from preprocess.readers.shards import Shard

_MARKERS_PER_REQUEST = 1_000
_JPEG_KEYS = {"images", "jpeg_quality", "jpeg_subsampling", "max_pixels", "decode_check"}
_IMAGE_KEYS = _JPEG_KEYS | {"beton_samples", "beton_size", "shuffle_window", "shuffle_seed"}


@dataclass(frozen=True)
class BuildContext:
    """What all stages of one build share."""

    layout: Layout
    settings: Pipeline
    tokenizer: Tokenizer  # of `settings`
    workers: int  # processes
    captions: tuple[Choice, ...]  # where to read a sample's caption
    subset: str | None  # fingerprint of the chosen uids, None for all samples

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
        """Fingerprint of what decides the rows of one shard: no IDF formula or word pairs, which all shards decide, and
        no tokenizer's path, since the tokenizer's own fingerprint covers its files, stop words and WordNet.
        """
        corpus = {"idf", "ngrams", "ngram_classes", "ngram_min_count", "tokenizer", "wordnet", "stop_words"}
        labels = {key: value for key, value in self.options["labels"].items() if key not in corpus}
        return fingerprint({**self.options, "labels": labels, "images": None})

    @property
    def image_options(self) -> str:
        """Fingerprint of what decides the bytes of betons, given the label files."""
        return fingerprint({"format": FORMAT_VERSION, "images": self.options["images"]})


# -- markers


class Marker(BaseModel):
    """The record of a finished task. A damaged file, or one of another form, is no marker: the task runs again."""

    model_config = ConfigDict(frozen=True, strict=True)

    @property
    def name(self) -> str:
        """Of its task; its file is `<name>.json`."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        """Label rows, or samples with an image, in the task's files."""
        raise NotImplementedError


class LabelMarker(Marker):
    """One shard's label file and count file are whole."""

    options: str  # BuildContext.label_options
    source: dict[str, str | int]  # path, bytes and time of the shard
    shard: str
    rows: int
    tokens: int | None = None  # token ids of all rows; None in markers of earlier versions
    unlabelled: int | None = None  # rows without a label; None in markers of earlier versions
    outside_subset: int  # samples with a caption that the subset does not name
    sha256: str  # of the label file
    count_bytes: int  # length of the count file
    keys_sha256: str
    reasons: dict[str, int]  # reason -> rejected samples
    pairs: str | None = None  # SHA-256 of the pairs.parquet whose classes are in the rows

    @property
    def name(self) -> str:
        return self.shard

    @property
    def samples(self) -> int:
        return self.rows


class GroupMarker(Marker):
    """The betons of one group of shards, or its image index files, are whole."""

    options: str  # BuildContext.image_options
    first: int  # this, count and shards: the group, see plan.Group
    count: int
    shards: list[list[Any]]
    files: list[BetonPart]
    reasons: dict[str, int]  # reason -> rejected images
    damaged_metadata: int | None = None  # images that are kept although their metadata are damaged; None: none

    @property
    def name(self) -> str:
        return f"{self.first:05d}"

    @property
    def samples(self) -> int:
        return sum(file.samples for file in self.files)


class CorpusMarker(Marker):
    """What is made from all shards is whole: idf.parquet and idf.duckdb, or pairs.parquet."""

    of: dict[str, str | int]  # fingerprints and options of what it was made from
    sha256: str  # of the Parquet file


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
    store: Any = folder  # a UPath
    listed = file_sizes(folder)
    names_by_path = {(store / f"{name}.json").path: name for name in names if f"{name}.json" in listed}
    paths, read = sorted(names_by_path), {}
    for start in range(0, len(paths), _MARKERS_PER_REQUEST):
        contents = store.fs.cat(paths[start : start + _MARKERS_PER_REQUEST], on_error="omit")
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
    """Write a marker atomically, with the rejected samples: these are only read from the file, since there may be more
    than fit into memory.
    """
    content = marker.model_dump(exclude_none=True)
    write_json(path, content if faults is None else {**content, "faults": faults})


def read_faults(path: Path) -> list[list[str]]:
    """The rejected samples in a marker: (key, reason, detail), in a group's marker (shard, key, reason, detail)."""
    return (_read_json(path) or {}).get("faults", [])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# -- stages


class Task(Protocol[M]):  # type: ignore[misc]  # M is in is_done alone, but T of Stage takes it as it is
    """One unit of work, picklable."""

    @property
    def name(self) -> str: ...  # of its marker

    @property
    def shards(self) -> Collection[str]: ...  # names of the shards whose rows its files hold

    @property
    def file_count(self) -> int: ...  # for progress

    def is_done(self, marker: M, sizes: Mapping[str, int]) -> bool:
        """Whether the marked files are what this task would make. `sizes`: path below the output folder -> bytes."""
        ...


@dataclass(frozen=True)
class CorpusTask:
    """What is made from all shards, by one task in this process."""

    name: str
    of: Mapping[str, str | int]  # as in CorpusMarker
    shards: list[str]  # names of all shards
    files: tuple[str, ...]  # paths below the output folder that have to exist
    keep: bool = False  # keep existing files whatever they were made from
    file_count: int = 1

    def is_done(self, marker: CorpusMarker, sizes: Mapping[str, int]) -> bool:
        return (self.keep or marker.of == self.of) and all(file in sizes for file in self.files)


T = TypeVar("T", bound=Task[Any])


@dataclass(frozen=True)
class Stage(Generic[T, M]):
    """What the tasks of a stage have in common."""

    title: str | None  # for progress; None: one task for all shards, done in this process
    work: Callable[[T], M]  # in a worker: writes a task's files, then its marker, and returns the marker
    marker: type[M]
    markers: Path  # folder of the markers
    outputs: Sequence[Path]  # folders of the tasks' files


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
        tasks: all tasks of the stage.
        mine: names of the tasks that this process may run, the share of an array job; None for all.
        fresh: names of shards that the manifest does not list. It is removed before a file of any other shard changes.
        prepare: called before the work with the names of the tasks whose marker is of other input or options.
    """
    layout = build.layout
    markers = read_markers(stage.markers, [task.name for task in tasks], stage.marker)
    sizes: dict[str, int] = {}
    for folder in stage.outputs:
        prefix = "" if folder == layout.out else f"{folder.name}/"
        sizes |= {prefix + name: size for name, size in file_sizes(folder).items()}
    marked = [(task, markers[task.name]) for task in tasks if task.name in markers]
    done = {task.name: marker for task, marker in marked if task.is_done(marker, sizes)}
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
        finished = sum(counts[name] for name in counts.keys() & done.keys())
        options_file = None if is_remote(layout.out) else layout.markers / "options.json"
        with Meter(stage.title, sum(counts.values()), finished) as meter:
            for marker in run_tasks(stage.work, missing, build.workers, build.settings.build.engine, options_file):
                done[marker.name] = marker
                meter.advance(marker.samples, counts[marker.name])
    return [done[task.name] for task in tasks if task.name in done]


def file_sizes(folder: Path) -> dict[str, int]:
    """Name -> size in bytes of all files in `folder`, by one listing; empty for a missing folder."""
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
    """A folder for what exceeds DuckDB's memory: in the output folder; for an object store, on this machine."""
    if is_remote(layout.out):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    spill = layout.out / "spill.partial"
    try:
        with disk_errors(spill):
            yield library_path(spill)
    finally:
        shutil.rmtree(spill, ignore_errors=True)


# -- the output folder as a whole


def remove_manifest(layout: Layout) -> None:
    """Mark the output folder as unfinished, before any file that the manifest names changes; nothing else removes the
    manifest.
    """
    layout.manifest.unlink(missing_ok=True)


def remove_build(layout: Layout) -> None:
    """`--overwrite`: remove only what builds have written to the output folder."""
    remove_manifest(layout)
    for name in ("options", "idf", "pairs", "subset"):
        (layout.markers / f"{name}.json").unlink(missing_ok=True)
    for path in (layout.idf_parquet, layout.idf_duckdb, layout.quarantine, layout.config, layout.pairs, layout.subset):
        path.unlink(missing_ok=True)
    for marker in (layout.markers / "labels").glob("*.json"):
        shard = marker.name.removesuffix(".json")
        layout.label_file(shard).unlink(missing_ok=True)
        layout.count_file(shard).unlink(missing_ok=True)
        marker.unlink()
    for copy in (True, False):
        for _, path in image_folder(layout, copy=copy).numbered():
            path.unlink(missing_ok=True)
    layout.image_sources.unlink(missing_ok=True)
    remove_leftovers(layout)


def remove_leftovers(layout: Layout) -> None:
    """Remove the temporary files of killed processes, while no other process may write. An object store has none."""
    markers = [layout.markers, *(layout.markers / name for name in ("labels", "beton", "places"))]
    remove_partials(layout.out, layout.labels, layout.counts, layout.betons, layout.image_index, *markers)


def check_same_options(build: BuildContext, *, alone: bool) -> None:
    """Refuse other options than those of the output folder, once a shard was labelled with them.

    `alone`: no other process may write, so options with which no shard was labelled (they named a missing column) are
    replaced.
    """
    path = build.layout.markers / "options.json"
    before = _read_json(path)
    if before == build.options:
        return
    if before is None or (alone and not any((build.layout.markers / "labels").glob("*.json"))):
        with own_partials():  # several members of an array job may write it at the same moment
            write_json(path, build.options)
        return
    raise UserError(
        f"{build.layout.out} was begun with other options: {'; '.join(_differences(before, build.options))}",
        allowed="the options it was begun with",
        fix="give another --out, or --overwrite to remove what was built there",
    )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = {key: f"{path}.{key}".lstrip(".") for key in sorted(before.keys() | now.keys())}
        return [line for key, name in keys.items() for line in _differences(before.get(key), now.get(key), name)]
    return [] if before == now else [f"{path} was {before!r}, is now {now!r}"]


ImageOutput = Literal["betons", "places", "none"]
"""What is made of the images; `places`: image index files."""


@dataclass(frozen=True)
class BuildInputs:
    """done/inputs.json: the shards of an output folder, so that `append` can add more and a damaged file be rebuilt.

    The manifest names no path of a machine; this file does, as the markers do.
    """

    images: ImageOutput
    batches: list[list[Shard]]  # of build-labels, then of every append

    @property
    def shards(self) -> list[Shard]:
        return [shard for batch in self.batches for shard in batch]


def write_inputs(layout: Layout, inputs: BuildInputs) -> None:
    """Write inputs.json atomically, if it differs."""
    if read_inputs(layout) != inputs:
        batches = [[asdict(shard) for shard in batch] for batch in inputs.batches]
        write_json(layout.record, {"images": inputs.images, "batches": batches})


def read_inputs(layout: Layout) -> BuildInputs | None:
    """None for a missing or damaged file."""
    try:
        content = json.loads(layout.record.read_bytes())
        return BuildInputs(content["images"], [[Shard(**shard) for shard in batch] for batch in content["batches"]])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
