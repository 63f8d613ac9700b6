"""done/inputs.json: which shards an OUT was made from, batch by batch, so that more can be added to it and a damaged file made anew.

The manifest names no path of a machine; this file, like the markers beside it, does.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from labels.files import write_json
from labels.layout import Layout
from preprocess.inputs.shards import Shard

Images = Literal["betons", "places", "none"]
"""What is made of the images."""


@dataclass(frozen=True)
class Record:
    """`batches`: the shards of build-labels, then those of every append."""

    images: Images
    batches: list[list[Shard]]

    @property
    def shards(self) -> list[Shard]:
        return [shard for batch in self.batches for shard in batch]


def write_record(layout: Layout, record: Record) -> None:
    """Put the record in place in one step, if it differs."""
    if read_record(layout) != record:
        batches = [[asdict(shard) for shard in batch] for batch in record.batches]
        write_json(layout.record, {"images": record.images, "batches": batches})


def read_record(layout: Layout) -> Record | None:
    """None if there is none, or it is damaged."""
    try:
        found = json.loads(layout.record.read_bytes())
        return Record(found["images"], [[Shard(**shard) for shard in batch] for batch in found["batches"]])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
