"""A table (Parquet, CSV, TSV) as a shard: its captions as rows.

batches -> status success -> keys, repeated ones out -> captions, missing ones out -> RowBatch
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from labels.errors import UserError
from preprocess.inputs.repeats import Repeats
from preprocess.readers.base import ROWS, Fault, RowBatch
from preprocess.readers.caption_key import Choice, column_choices
from preprocess.readers.columns import (
    KEY_COLUMNS,
    SIZE_COLUMNS,
    STATUS_COLUMN,
    blank_rows,
    row_captions,
    row_keys,
    row_sizes,
    row_uids,
    success_rows,
)
from preprocess.readers.shards import Shard
from preprocess.readers.table import Table, TableDamaged, open_table

_KEY_ROWS = 1 << 17
_IDENTITY = (*KEY_COLUMNS, STATUS_COLUMN)


def read_table_rows(shard: Shard, choices: Sequence[Choice], batch_rows: int) -> Iterator[RowBatch]:
    """All rows of a table in its order. A table that is cut or damaged ends with a fault of an empty key.

    Args:
        shard: of kind parquet or csv.
        choices: as `parse_caption_key` gives them; items of other kinds, and columns that are not there, count as missing.
        batch_rows: rows of a batch at most.

    Raises:
        UserError: the table has no column that `choices` name, or one of a type that cannot be read.
    """
    try:
        table = open_table(shard)
    except TableDamaged as error:
        yield RowBatch(ROWS.empty_table(), [error.fault])
        return
    names = table.schema.names
    usable = caption_choices(shard, choices, names)
    if not usable:
        columns = ", ".join(map(repr, names))
        raise UserError(
            f"{shard.path} has no column that build.caption_key names ({', '.join(map(str, choices))})",
            allowed=f"its columns: {columns}" + ("; a CSV needs a header line" if shard.kind == "csv" else ""),
            mend=f"add `--caption-key {shard.kind}:COLUMN` with one of them",
        )
    captions = [item.name for choice in usable for item in choice.items]
    sizes = [name for pair in SIZE_COLUMNS for name in pair]
    wanted = [name for name in (*_IDENTITY, *sizes, *captions) if name in names]
    # Told after all rows: Arrow reads ahead, so when it meets a line says nothing of the batch that the line is near.
    at_the_end: list[Fault] = []
    samples = _samples(table, wanted, batch_rows, at_the_end)
    if table.rows is not None and table.rows <= batch_rows:  # as the side Parquet of a tar: read once, for keys and rows
        samples = list(samples)
        read = samples
        repeats = Repeats(lambda: (keys for keys, _ in read))
    elif identity := identity_columns(names):
        repeats = Repeats(lambda: (keys for keys, _ in _samples(table, identity, _KEY_ROWS, [])))
    else:
        repeats = None  # the keys are row numbers
    for keys, batch in samples:
        yield _rows(batch, keys, repeats, usable, shard.path)
    if at_the_end:
        yield RowBatch(ROWS.empty_table(), at_the_end)


def caption_choices(shard: Shard, choices: Sequence[Choice], names: Sequence[str]) -> tuple[Choice, ...]:
    """What of `choices` a table with the columns `names` can answer."""
    assert shard.kind != "tar"
    usable = []
    for choice in column_choices(choices, shard.kind):
        items = tuple(item for item in choice.items if item.name in names)
        if items:
            usable.append(Choice(items))
    return tuple(usable)


def identity_columns(names: Sequence[str]) -> list[str]:
    """The columns, of those that a table has, which `identified` needs."""
    return [name for name in _IDENTITY if name in names]


def identified(batch: pa.RecordBatch, first: int, path: str) -> tuple[pa.StringArray, pa.RecordBatch]:
    """Keys and rows of the samples of a batch: those with status success, where there is a status.

    Args:
        batch: with `identity_columns`.
        first: number of its first row in the table.
        path: of the table, for messages.
    """
    keys, success = row_keys(batch, first, path), success_rows(batch)
    return (keys, batch) if success is None else (keys.filter(success), batch.filter(success))


def _samples(table: Table, columns: list[str], batch_rows: int, faults: list[Fault]) -> Iterator[tuple[pa.StringArray, pa.RecordBatch]]:
    """Keys and rows of all samples; what cannot be read is told in `faults`."""
    try:
        for first, batch in table.batches(columns, batch_rows, faults):
            yield identified(batch, first, table.shard.path)
    except TableDamaged as error:
        faults.append(error.fault)


def _rows(batch: pa.RecordBatch, keys: pa.StringArray, repeats: Repeats | None, choices: Sequence[Choice], path: str) -> RowBatch:
    """The samples of a batch that have a caption, and the faults of the others, both in order."""
    captions, invalid = row_captions(batch, choices, path)
    faults: dict[int, tuple[str, str]] = {}
    if captions.null_count:
        looked = f"looked for: {', '.join(map(str, choices))}"
        faults |= dict.fromkeys(np.flatnonzero(captions.is_null()).tolist(), ("no caption", looked))
    faults |= {row: ("caption is not UTF-8", told) for row, told in invalid.items()}
    for row in blank_rows(captions).tolist():
        faults[row] = ("empty caption", f"{captions[row].as_buffer().size} bytes of white space")
    faults |= dict.fromkeys(repeats.find(keys) if repeats else (), ("repeated key", "the key occurred before in this table"))
    table = pa.Table.from_arrays([keys, row_uids(batch, path), *row_sizes(batch), captions], schema=ROWS)
    if faults:
        kept = np.ones(len(table), bool)
        kept[list(faults)] = False
        table = table.filter(pa.array(kept))
    return RowBatch(table, [Fault(keys[row].as_py(), *faults[row]) for row in sorted(faults)])
