"""What every reader of captions gives, whatever the shard is: rows before tokenizing, and the samples left out."""

from dataclasses import dataclass

import pyarrow as pa

from labels.manifest import LABELS

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class Fault:
    """A sample, or the rest of a tar, that cannot be read. `key` is empty where no key is known."""

    key: str
    reason: str
    detail: str


ROWS = pa.schema(
    [
        *(LABELS.field(name) for name in ("key", "uid", "width", "height")),
        pa.field("caption", pa.string(), nullable=False),
    ]
)
"""One row a sample: key string, uid string?, width and height int32? in pixels, caption string."""


@dataclass(frozen=True)
class RowBatch:
    """`table`: rows of schema ROWS in the shard's order; `faults`: samples of the same stretch of the shard that have
    no row.
    """

    table: pa.Table
    faults: list[Fault]
