"""One build: where to, with which settings, and the fingerprints by which finished work is recognised."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.errors import UserError
from labels.files import fingerprint, write_json
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
    """The marker at `path`, None if that work is not finished."""
    return json.loads(path.read_bytes()) if path.is_file() else None


def remove_build(layout: Layout) -> None:
    """`--overwrite`: exactly the files that a build makes, by their own names."""
    layout.manifest.unlink(missing_ok=True)
    for folder, pattern in ((layout.labels, "*.parquet*"), (layout.betons, "*.beton*"), (layout.markers, "*/*.json*")):
        for path in folder.glob(pattern):
            path.unlink()
    for path in (layout.idf_parquet, layout.idf_duckdb, layout.quarantine, layout.markers / "options.json"):
        path.unlink(missing_ok=True)


def check_same_options(build: Build) -> None:
    """Refuse to mix: OUT belongs to the options it was begun with."""
    path = build.layout.markers / "options.json"
    if not path.is_file():
        write_json(path, build.options)
        return
    before = json.loads(path.read_bytes())
    if before != build.options:
        raise UserError(
            f"{build.layout.out} was begun with other options: {'; '.join(_differences(before, build.options))}",
            allowed="the options it was begun with",
            mend="give another --out, or --overwrite to remove what this OUT holds",
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if before == now else [f"{path} was {before!r}, is now {now!r}"]
