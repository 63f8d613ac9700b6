"""A label dataset whose images stay in their tars, made from one with betons: the same samples in the same order."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from labels import beton
from labels.manifest import IMAGE_SPAN, Source, read_manifest, write_sources
from labels.storage import Layout, sha256_file


def with_image_index(out: Path, shards: Path, target: Path) -> Path:
    """Write `target` with an image index of the tars in `shards` for the samples of the betons of `out`."""
    shutil.copytree(out, target, ignore=shutil.ignore_patterns("beton", "rows"))
    manifest, layout = read_manifest(out), Layout(target)
    layout.image_index.mkdir()
    offsets: dict[str, tuple[int, int]] = {}
    keys: list[str] = []
    sources = {}
    for part in manifest.shards:
        path = shards / f"{part.name}.tar"
        sources[part.name] = Source(str(path.resolve()), path.stat().st_size)
        with tarfile.open(path) as tar:
            offsets |= {
                member.name[:-4]: (member.offset_data, member.size) for member in tar if member.name.endswith(".jpg")
            }
        keys += pq.read_table(layout.label_file(part.name))["key"].to_pylist()
    write_sources(layout, sources)
    firsts = [part.first_index for part in manifest.shards]
    parts = []
    for part in manifest.betons:
        meta = np.fromfile(
            Layout(out).beton_file(part.number), beton.METADATA, part.samples, offset=beton.METADATA_OFFSET
        )
        spans = np.zeros(part.samples, IMAGE_SPAN)
        spans["index"], spans["width"], spans["height"] = (
            meta["index"],
            meta["image"]["width"],
            meta["image"]["height"],
        )
        spans["shard"] = np.searchsorted(firsts, meta["index"], side="right") - 1
        for span in spans:
            span["offset"], span["bytes"] = offsets[keys[span["index"]]]
        path = layout.image_index_file(part.number)
        np.save(path, spans)
        parts.append(part.model_dump() | {"bytes": path.stat().st_size, "sha256": sha256_file(path)})
    written = json.loads(layout.manifest.read_text()) | {"betons": [], "places": parts}
    layout.manifest.write_text(json.dumps(written))
    return target
