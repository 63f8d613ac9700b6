"""What every reader of captions gives, whatever the shard is: rows before tokenizing, and the samples left out."""

from dataclasses import dataclass

import pyarrow as pa

from labels.schema import LABELS
from preprocess.inputs.tars import Fault

ROWS = pa.schema([*(LABELS.field(name) for name in ("key", "uid", "width", "height")), pa.field("caption", pa.string(), nullable=False)])
"""One row a sample: key string, uid string?, width and height int32? in pixels, caption string."""


@dataclass(frozen=True)
class RowBatch:
    """`table`: rows of schema ROWS in the shard's order; `faults`: samples of the same stretch of the shard that have no row."""

    table: pa.Table
    faults: list[Fault]
