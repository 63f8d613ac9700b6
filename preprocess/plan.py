"""One build: where to, with which settings, and the fingerprints by which finished work is recognised."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.errors import UserError
from labels.files import TEMPORARY_SUFFIX, fingerprint, write_json
from labels.layout import Layout
from labels.schema import FORMAT_VERSION
from labels.settings import Pipeline
from preprocess.tokenizer import Tokenizer

Marker = dict[str, Any]
"""What stands in done/*/*.json: "this file is whole, made from that, with these options"."""


@dataclass(frozen=True)
class Build:
    """One build: where to, with which settings, and the fingerprints that markers carry."""

    layout: Layout
    settings: Pipeline
    tokenizer: Tokenizer
    workers: int

    @property
    def options(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result, for the manifest and for messages."""
        return {
            "format": FORMAT_VERSION,
            "labels": self.settings.labels.model_dump(),
            "tokenizer": self.tokenizer.fingerprint,
            "images": {"jpeg_quality": self.settings.build.jpeg_quality, "max_pixels": self.settings.build.max_pixels},
        }

    @property
    def label_options(self) -> str:
        """Fingerprint of what decides label rows. The IDF formula does not: it is applied after counting."""
        labels = {key: value for key, value in self.options["labels"].items() if key != "idf"}
        return fingerprint({**self.options, "labels": labels, "images": None})

    @property
    def image_options(self) -> str:
        return fingerprint({"format": FORMAT_VERSION, "images": self.options["images"]})


def read_marker(path: Path) -> Marker | None:
    """The marker at `path`, None if that work is not finished or the marker is damaged."""
    try:
        marker = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def beton_numbers(layout: Layout) -> list[int]:
    """Numbers of the betons in OUT, whole or not; other files beside them are not a build's."""
    names = {path.name.removesuffix(".beton") for path in layout.betons.glob("*.beton")}
    names |= {path.name.removesuffix(".json") for path in (layout.markers / "beton").glob("*.json")}
    return sorted({int(name) for name in names if name.isdecimal()})


def remove_build(layout: Layout) -> None:
    """`--overwrite`: what builds have made here, and nothing else."""
    for path in (layout.manifest, layout.markers / "options.json", layout.markers / "idf.json"):
        path.unlink(missing_ok=True)
    for path in (layout.idf_parquet, layout.idf_duckdb, layout.quarantine, layout.config):
        path.unlink(missing_ok=True)
    for marker in (layout.markers / "labels").glob("*.json"):
        layout.label_file(marker.name.removesuffix(".json")).unlink(missing_ok=True)
        marker.unlink()
    for number in beton_numbers(layout):
        layout.beton_marker(number).unlink(missing_ok=True)
        layout.beton_file(number).unlink(missing_ok=True)
    for folder in (layout.out, layout.labels, layout.betons, *layout.markers.glob("*/"), layout.markers):
        for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
            if path.is_file():
                path.unlink()


def check_out(out: Path) -> None:
    """Refuse, before any work, an OUT that cannot be written or that DuckDB could not name."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file", allowed="a folder, there or not yet", mend="give another --out")
    if found := sorted(set("*?[]") & set(str(out.resolve()))):
        raise UserError(
            f"the path {out.resolve()} holds {' '.join(found)}, which DuckDB takes for a pattern", mend="give --out a path without it"
        )


def check_same_options(build: Build) -> None:
    """Refuse to mix: OUT belongs to the options it was begun with."""
    path = build.layout.markers / "options.json"
    before = read_marker(path)
    if before is None:
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
