"""A shard of any kind, as rows of captions."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile

from preprocess.readers.base import RowBatch
from preprocess.readers.caption_key import Choice, column_choices
from preprocess.readers.shards import Shard
from preprocess.readers.table import TableDamaged, open_table, read_table_rows
from preprocess.readers.tar import read_tar_rows

_BATCH_ROWS = 32_768


def read_rows(shard: Shard, choices: tuple[Choice, ...]) -> Iterator[RowBatch]:
    """All samples of a shard in its order: rows, and what has to be left out. See `reads_side` for tars with a side
    Parquet.
    """
    if shard.kind != "tar":
        yield from read_table_rows(shard, choices, _BATCH_ROWS)
    elif reads_side(shard, choices):
        yield from read_table_rows(_side(shard), choices, _BATCH_ROWS)
    else:
        yield from read_tar_rows(shard, choices)


def reads_side(shard: Shard, choices: tuple[Choice, ...]) -> bool:
    """Whether a tar's captions come from its side Parquet: it has keys, and a column that `choices` name before any
    member of the tar.
    """
    if shard.kind != "tar" or shard.side is None:
        return False
    first = list(takewhile(lambda choice: not any(item.kind in ("member", "json") for item in choice.items), choices))
    try:
        names = open_table(_side(shard)).schema.names
    except TableDamaged:
        return False  # the tar itself has all that counts
    return "key" in names and any(
        item.name in names for choice in column_choices(first, "parquet") for item in choice.items
    )


def _side(shard: Shard) -> Shard:
    assert shard.side is not None
    return replace(shard, kind="parquet", path=shard.side, bytes=shard.side_bytes, side=None)
