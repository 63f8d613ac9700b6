"""One build: where to, with which settings, and the fingerprints by which finished work is recognised."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.errors import UserError
from labels.files import fingerprint, is_remote, own_partials, remove_partials, write_json
from labels.layout import Layout
from labels.schema import FORMAT_VERSION
from labels.settings import Pipeline
from labels.tokenizers.tokenizer import Tokenizer
from preprocess.inputs.captions import Choice

_MARKERS_AT_ONCE = 1_000
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
Marker = dict[str, Any]
"""What stands in done/*/*.json: "this file is whole, made from that, with these options"."""


@dataclass(frozen=True)
class Build:
    """One build: where to, with which settings, and the fingerprints that markers carry.

    `captions`: where a sample's caption is looked for; `subset`: fingerprint of the chosen uids, None for all samples.
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
        """Fingerprint of what decides a shard's rows by itself: not the IDF formula, nor word pairs, which the whole corpus decides.

        Nor where the tokenizer came from: its own fingerprint, which covers stop words and WordNet too, is there.
        """
        corpus = {"idf", "ngrams", "ngram_classes", "ngram_min_count", "tokenizer", "wordnet", "stop_words"}
        labels = {key: value for key, value in self.options["labels"].items() if key not in corpus}
        return fingerprint({**self.options, "labels": labels, "images": None})

    @property
    def image_options(self) -> str:
        return fingerprint({"format": FORMAT_VERSION, "images": self.options["images"]})


def read_marker(path: Path) -> Marker | None:
    """The marker at `path`, None if that work is not finished or the marker is damaged."""
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return None


def read_summary(path: Path) -> Marker | None:
    """The same without the list of faults, which may be long."""
    marker = read_marker(path)
    return _without_faults(marker) if marker else None


def read_summaries(folder: Path, names: Sequence[str]) -> dict[str, Marker]:
    """The summaries of those of `names` that have a marker in `folder`; from an object store many at a time."""
    if not is_remote(folder):
        found = ((name, read_summary(folder / f"{name}.json")) for name in names)
        return {name: marker for name, marker in found if marker}
    summaries: dict[str, Marker] = {}
    listed = file_sizes(folder)
    paths = {(folder / f"{name}.json").path: name for name in names}  # type: ignore[attr-defined]  # a UPath
    there = sorted(path for path, name in paths.items() if f"{name}.json" in listed)
    for start in range(0, len(there), _MARKERS_AT_ONCE):
        raw = folder.fs.cat(there[start : start + _MARKERS_AT_ONCE], on_error="omit")  # type: ignore[attr-defined]  # a UPath
        for path, content in raw.items():
            if marker := _parsed(content):
                summaries[paths[path]] = _without_faults(marker)
    return summaries


def file_sizes(folder: Path) -> dict[str, int]:
    """Name and size in bytes of all files in `folder`, by one listing; empty if it is not there."""
    if is_remote(folder):
        found = folder.fs.find(folder.path, maxdepth=1, detail=True)  # type: ignore[attr-defined]  # a UPath
        return {name.rpartition("/")[2]: int(info["size"]) for name, info in found.items()}
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _without_faults(marker: Marker) -> Marker:
    return {key: value for key, value in marker.items() if key != "faults"}


def _parsed(content: bytes) -> Marker | None:
    try:
        marker = json.loads(content)
    except ValueError:
        return None
    return marker if isinstance(marker, dict) else None


@dataclass(frozen=True)
class ImageFolder:
    """Where the second pass writes: betons, or with `--no-images` places."""

    files: Path
    suffix: str
    markers: Path

    def numbered(self) -> list[tuple[int, Path]]:
        """Files and markers here, whole or not, with their numbers; those of other names are not a build's."""
        paths = [*self.files.glob(f"*{self.suffix}"), *self.markers.glob("*.json")]
        return [(int(path.stem), path) for path in paths if path.stem.isdecimal() and path.stem == f"{int(path.stem):05d}"]


def image_folder(layout: Layout, *, copy: bool) -> ImageFolder:
    """`copy`: betons, else places."""
    if copy:
        return ImageFolder(layout.betons, ".beton", layout.markers / "beton")
    return ImageFolder(layout.places, ".npy", layout.markers / "places")


def remove_build(layout: Layout) -> None:
    """`--overwrite`: what builds have made here, and nothing else."""
    for name in ("options", "idf", "pairs", "subset"):
        (layout.markers / f"{name}.json").unlink(missing_ok=True)
    for path in (layout.manifest, layout.idf_parquet, layout.idf_duckdb, layout.quarantine, layout.config, layout.pairs, layout.subset):
        path.unlink(missing_ok=True)
    for marker in (layout.markers / "labels").glob("*.json"):
        layout.label_file(marker.name.removesuffix(".json")).unlink(missing_ok=True)
        layout.count_file(marker.name.removesuffix(".json")).unlink(missing_ok=True)
        marker.unlink()
    for copy in (True, False):
        for _, path in image_folder(layout, copy=copy).numbered():
            path.unlink(missing_ok=True)
    layout.place_sources.unlink(missing_ok=True)
    remove_leftovers(layout)


def remove_leftovers(layout: Layout) -> None:
    """Remove the temporary files of killed processes; only while nobody else may write. An object store has none."""
    markers = [layout.markers, *(layout.markers / name for name in ("labels", "beton", "places"))]
    remove_partials(layout.out, layout.labels, layout.counts, layout.betons, layout.places, *markers)


def check_out(out: Path) -> None:
    """Refuse, before any work, an OUT that cannot be written or that DuckDB could not name."""
    whole = str(out) if is_remote(out) else str(out.resolve())
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", allowed="a folder, there or not yet", mend="give another --out")
    if found := sorted(set("*?[]") & set(whole)):
        raise UserError(f"the path {whole} holds {' '.join(found)}, which DuckDB takes for a pattern", mend="give --out a path without it")


def check_same_options(build: Build, *, alone: bool) -> None:
    """Refuse to mix: OUT belongs to the options it was begun with, once there is a shard of them.

    `alone`: nobody else may write to OUT, so that options of which nothing was made (they named a column that is not there) give way.
    """
    path = build.layout.markers / "options.json"
    before = read_marker(path)
    if before is None or (alone and before != build.options and not any((build.layout.markers / "labels").glob("*.json"))):
        with own_partials():  # members of an array job may come here at the same moment
            write_json(path, build.options)
    elif before != build.options:
        raise UserError(
            f"{build.layout.out} was begun with other options: {'; '.join(_differences(before, build.options))}",
            allowed="the options it was begun with",
            mend="give another --out, or --overwrite to remove what was built there",
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if before == now else [f"{path} was {before!r}, is now {now!r}"]
