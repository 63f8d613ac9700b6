"""Explicit Arrow schemas of every table that stage 1 writes; versioned, never inferred."""

import pyarrow as pa

FORMAT_VERSION = 1
PAD_ID = -1
"""Fills the end of a padded label row; no token has it."""

_VERSION = {b"superclass.format": str(FORMAT_VERSION).encode()}

LABELS = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("uid", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("token_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("label_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
    ],
    metadata=_VERSION,
)
"""One row a sample. `token_ids`: in the caption's order, without specials, at most the context limit.
`label_ids`: sorted, unique. `width`, `height`: pixels, null where neither metadata nor image header told them."""

COUNTS = pa.schema(
    [pa.field("token_id", pa.int32(), nullable=False), pa.field("document_frequency", pa.int64(), nullable=False)], metadata=_VERSION
)
"""One shard's document frequencies: one row a token that occurs, ascending."""

TOKENS = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("document_frequency", pa.int64(), nullable=False),
        pa.field("idf", pa.float64(), nullable=False),
    ],
    metadata=_VERSION,
)
"""One row a vocabulary entry, seen or not, so that row number = token_id = column of the head."""

QUARANTINE = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ],
    metadata=_VERSION,
)
"""One row a sample left out. `stage` is `labels` (no label row) or `images` (label row, but in no beton)."""
