"""One shard to one beton: the unit of work of the second pass.

shard + labels/<shard>.parquet -> beton/<nnnnn>.beton -> done/beton/<nnnnn>.json
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from labels import beton
from labels.files import local_copy, sha256_file, whole_file, write_json
from labels.layout import Layout
from labels.settings import Build
from labels.sparse import pad_rows
from preprocess.beton_writer import BetonWriter
from preprocess.images import BadImage, prepare
from preprocess.inputs.captions import Choice
from preprocess.inputs.pictures import open_pictures
from preprocess.inputs.shards import Shard
from preprocess.inputs.tars import Fault

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
    captions: tuple[Choice, ...]
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
    """Write one beton and its marker; return the marker less the list of faults."""
    layout = Layout(task.out)
    path, marker_path = layout.beton_file(task.number), layout.beton_marker(task.number)
    marker_path.unlink(missing_ok=True)  # an older marker must not vouch for the new file
    with local_copy(layout.label_file(task.shard.name)) as labels:
        table = pq.read_table(labels, columns=["key", "label_ids"]).combine_chunks()
    lists = table["label_ids"].chunk(0) if len(table) else None
    label_rows = (
        pad_rows(lists.values.to_numpy(), lists.offsets.to_numpy(), task.label_limit)
        if lists is not None
        else np.empty((0, task.label_limit), np.int32)
    )
    faults: list[Fault] = []
    keys = table["key"].to_pylist()
    with open_pictures(task.shard, keys, task.captions) as pictures:
        room = min(max(_MIN_IMAGE_ROOM, _GROWTH * pictures.largest), beton.MAX_PAGE_BYTES // 2)
        page_bytes = beton.page_bytes_for(room + 4 * task.label_limit)
        with whole_file(path) as partial:
            with BetonWriter(partial, len(table), page_bytes, task.label_limit) as writer:
                for row, data in pictures.rows:
                    if isinstance(data, Fault):
                        faults.append(data)
                        continue
                    try:
                        jpeg, width, height = prepare(data, task.settings.jpeg_quality, task.settings.max_pixels)
                        if len(jpeg) + 4 * task.label_limit > page_bytes:
                            raise BadImage("image file too large", f"{len(jpeg)} bytes do not fit a page of {page_bytes}")
                    except BadImage as error:
                        faults.append(Fault(keys[row], error.reason, str(error)))
                        continue
                    writer.add(jpeg, width, height, label_rows[row], task.first_index + row)
            size, digest = partial.stat().st_size, sha256_file(partial)  # while the file is on this machine
    marker = {
        **task.wanted,
        "number": task.number,
        "samples": writer.samples,
        "bytes": size,
        "sha256": digest,
        "reasons": dict(sorted(Counter(fault.reason for fault in faults).items())),
    }
    write_json(marker_path, {**marker, "faults": [[fault.key, fault.reason, fault.detail] for fault in faults]})
    return marker
