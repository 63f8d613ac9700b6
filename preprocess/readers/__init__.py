"""Readers of captions: DATA -> shards.py -> `read_rows` -> RowBatch of schema ROWS (base.py), in the shard's order.

tar                tar.py, compiled in tar_index.py   -> rows of its json, txt and image members
Parquet, CSV, TSV  table.py, quoting.py, columns.py   -> rows of its columns; also the side Parquet of a tar
either             base.py, from build.caption_key     -> which member, field or column the caption is
                   images.py                          -> where the image files of the label rows are
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

from preprocess.readers.base import Choice, RowBatch, column_choices
from preprocess.readers.shards import Shard
from preprocess.readers.table import TableDamaged, open_table, read_table_rows
from preprocess.readers.tar import read_tar_rows


def read_rows(shard: Shard, choices: tuple[Choice, ...]) -> Iterator[RowBatch]:
    """All samples of a shard in its order: rows, and faults of what is rejected."""
    if shard.kind == "tar" and not reads_side(shard, choices):
        return read_tar_rows(shard, choices)
    return read_table_rows(_side(shard) if shard.kind == "tar" else shard, choices)


def reads_side(shard: Shard, choices: tuple[Choice, ...]) -> bool:
    """Whether a tar's captions come from its side Parquet: it has keys, and a column that `choices` name before any
    member of the tar.
    """
    if shard.kind != "tar" or shard.side is None:
        return False
    first = takewhile(lambda choice: not any(item.kind in ("member", "json") for item in choice.items), choices)
    try:
        names = open_table(_side(shard)).schema.names
    except TableDamaged:
        return False  # the tar itself has the captions
    columns = [item.name for choice in column_choices(first, "parquet") for item in choice.items]
    return "key" in names and not set(columns).isdisjoint(names)


def _side(shard: Shard) -> Shard:
    assert shard.side is not None
    return replace(shard, kind="parquet", path=shard.side, bytes=shard.side_bytes, side=None)
