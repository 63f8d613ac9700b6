"""One shard to one beton: the unit of work of the second pass.

shard.tar + labels/<shard>.parquet -> beton/<nnnnn>.beton -> done/beton/<nnnnn>.json
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from labels import beton
from labels.errors import UserError
from labels.files import sha256_file, whole_file, write_json
from labels.layout import Layout
from labels.settings import Build
from labels.sparse import pad_rows
from preprocess.beton_writer import BetonWriter
from preprocess.images import BadImage, prepare
from preprocess.shards import Shard
from preprocess.tars import Fault, Sample, walk

# Room for a converted image that outgrows its source, e.g. a tiny palette PNG.
_GROWTH = 4
_MIN_IMAGE_ROOM = 1 << 20


@dataclass(frozen=True)
class BetonTask:
    """`options`: fingerprint of what decides the beton's bytes beside the label file's."""

    shard: Shard
    number: int
    first_index: int
    labels_sha256: str
    label_limit: int
    out: Path
    settings: Build
    options: str

    @property
    def wanted(self) -> dict[str, Any]:
        """What a marker must say for its beton to be this task's result."""
        return {
            "options": self.options,
            "source": self.shard.source,
            "shard": self.shard.name,
            "first_index": self.first_index,
            "labels_sha256": self.labels_sha256,
        }


def write_beton(task: BetonTask) -> dict[str, Any]:
    """Write one beton and its marker; return the marker."""
    layout = Layout(task.out)
    path, marker_path = layout.beton_file(task.number), layout.beton_marker(task.number)
    marker_path.unlink(missing_ok=True)  # an older marker must not vouch for the new file
    table = pq.read_table(layout.label_file(task.shard.name), columns=["key", "label_ids"]).combine_chunks()
    lists = table["label_ids"].chunk(0) if len(table) else None
    label_rows = (
        pad_rows(lists.values.to_numpy(), lists.offsets.to_numpy(), task.label_limit)
        if lists is not None
        else np.empty((0, task.label_limit), np.int32)
    )
    faults: list[Fault] = []
    with task.shard.open() as file:
        page_bytes = beton.page_bytes_for(_largest_image_bytes(file, task.shard) + 4 * task.label_limit)
        file.seek(0)
        samples = _samples_with_rows(file, task.shard, table["key"].to_pylist())
        with whole_file(path) as partial, BetonWriter(partial, len(table), page_bytes, task.label_limit) as writer:
            for row, sample in samples:
                assert sample.image_suffix is not None  # a row exists only for samples with an image
                data = sample.read(sample.image_suffix) or b""
                try:
                    jpeg, width, height = prepare(data, task.settings.jpeg_quality, task.settings.max_pixels)
                    if len(jpeg) + 4 * task.label_limit > page_bytes:
                        raise BadImage("image file too large", f"{len(jpeg)} bytes do not fit a page of {page_bytes}")
                except BadImage as error:
                    faults.append(Fault(sample.key, error.reason, str(error)))
                    continue
                writer.add(jpeg, width, height, label_rows[row], task.first_index + row)
    marker = {
        **task.wanted,
        "number": task.number,
        "samples": writer.samples,
        "bytes": path.stat().st_size,
        "sha256": sha256_file(path),
        "faults": [[fault.key, fault.reason, fault.detail] for fault in faults],
    }
    write_json(marker_path, marker)
    return marker


def _largest_image_bytes(file: Any, shard: Shard) -> int:
    """Upper bound, in bytes, for the largest image that goes into the beton; from the tar's headers alone."""
    sizes = [
        sample.members[sample.image_suffix].size for sample in walk(file, shard.bytes) if isinstance(sample, Sample) and sample.image_suffix
    ]
    return min(max([_MIN_IMAGE_ROOM, *(_GROWTH * size for size in sizes)]), beton.MAX_PAGE_BYTES // 2)


def _samples_with_rows(file: Any, shard: Shard, keys: list[str]) -> Iterator[tuple[int, Sample]]:
    """Pair every label row with its sample; both are in the tar's order."""
    row = 0
    for sample in walk(file, shard.bytes):
        if row < len(keys) and isinstance(sample, Sample) and sample.key == keys[row]:
            yield row, sample
            row += 1
    if row < len(keys):
        raise UserError(
            f"{shard.path} no longer holds the sample {keys[row]!r} that its label file has",
            mend="the tar changed during the build: run the same command again",
        )
