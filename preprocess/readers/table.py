"""A Parquet, CSV or TSV file as a shard: `read_table_rows` -> RowBatch of its captions, in bounded memory.

    open_table -> Table.batches -> `identified`: keys, downloads -> Repeats: repeated keys are rejected
               -> columns.row_captions: rows without a caption, or with one that is not UTF-8, are rejected -> RowBatch

CSV needs a header line; whether its quotes enclose fields is decided in quoting.py. Every column is read as binary, an
empty cell that is not quoted as null. A table that is cut or damaged ends with a Fault of an empty key.
"""

from __future__ import annotations

import codecs
import csv
import io
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from labels.native import njit
from labels.storage import UserError
from labels.tokenizers.kernels.table import Scalar, load, prefetch
from preprocess.readers.base import BATCH_ROWS, ROWS, Choice, Fault, RowBatch, column_choices, narrow_choices
from preprocess.readers.columns import (
    KEY_COLUMNS,
    SIZE_COLUMNS,
    STATUS_COLUMN,
    blank_rows,
    downloaded_rows,
    offsets_and_bytes,
    row_captions,
    row_keys,
    row_sizes,
    row_uids,
)
from preprocess.readers.quoting import Quotes, WithoutRows
from preprocess.readers.shards import Shard

_BLOCK_BYTES = 1 << 24  # of CSV, at once in memory; also the longest row that can be read
_READ_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20  # a CSV's header is no longer
_KEY_ROWS = 1 << 17
_IDENTITY = (*KEY_COLUMNS, STATUS_COLUMN)


def read_table_rows(shard: Shard, choices: Sequence[Choice], batch_rows: int = BATCH_ROWS) -> Iterator[RowBatch]:
    """All rows of a table in its order. Of `choices`, items of other kinds and of missing columns are ignored.

    UserError: the table has no column that `choices` name, or one of a type that cannot be read.
    """
    try:
        table = open_table(shard)
    except TableDamaged as error:
        yield RowBatch(ROWS.empty_table(), [error.fault])
        return
    assert shard.kind != "tar"
    names = table.schema.names
    usable = narrow_choices(column_choices(choices, shard.kind), lambda item: item.name in names)
    if not usable:
        header = "; a CSV needs a header line" if shard.kind == "csv" else ""
        raise UserError(
            f"{shard.path} has no column that build.caption_key names ({', '.join(map(str, choices))})",
            allowed=f"its columns: {', '.join(map(repr, names))}{header}",
            fix=f"add `--caption-key {shard.kind}:COLUMN` with one of them",
        )
    captions = [item.name for choice in usable for item in choice.items]
    sizes = [name for pair in SIZE_COLUMNS for name in pair]
    wanted = [name for name in (*_IDENTITY, *sizes, *captions) if name in names]
    # Yielded after all rows: Arrow reads ahead, so the current batch does not show where a damaged line is.
    damaged: list[Fault] = []
    samples = _samples(table, wanted, batch_rows, damaged)
    if table.rows is not None and table.rows <= batch_rows:  # such as a side Parquet: read once, for keys and rows
        samples = in_memory = list(samples)
        repeats = Repeats(lambda: (keys for keys, _ in in_memory))
    elif identity := identity_columns(names):
        repeats = Repeats(lambda: (keys for keys, _ in _samples(table, identity, _KEY_ROWS, [])))
    else:
        repeats = None  # the keys are row numbers
    for keys, batch in samples:
        yield _rows(batch, keys, repeats, usable, table)
    if damaged:
        yield RowBatch(ROWS.empty_table(), damaged)


def identity_columns(names: Sequence[str]) -> list[str]:
    """The columns, of those that a table has, which `identified` needs."""
    return [name for name in _IDENTITY if name in names]


def identified(
    batch: pa.RecordBatch, first: int, path: str, statuses: dict[str, str]
) -> tuple[pa.StringArray, pa.RecordBatch]:
    """Keys and rows of the samples of a batch: all but those that img2dataset did not download.

    The batch has the `identity_columns`; `first` is the number of its first row in the table; `statuses` is one for all
    batches of a table.
    """
    keys, downloaded = row_keys(batch, first, path), downloaded_rows(batch, path, statuses)
    return (keys, batch) if downloaded is None else (keys.filter(downloaded), batch.filter(downloaded))


def _samples(
    table: Table, columns: list[str], batch_rows: int, faults: list[Fault]
) -> Iterator[tuple[pa.StringArray, pa.RecordBatch]]:
    """Keys and rows of all samples; `faults` gets what cannot be read."""
    statuses: dict[str, str] = {}
    try:
        for first, batch in table.batches(columns, batch_rows, faults):
            yield identified(batch, first, table.shard.path, statuses)
    except TableDamaged as error:
        faults.append(error.fault)


def _rows(
    batch: pa.RecordBatch, keys: pa.StringArray, repeats: Repeats | None, choices: Sequence[Choice], table: Table
) -> RowBatch:
    """The samples of a batch that have a caption, and the faults of the others, both in order."""
    path = table.shard.path
    captions, invalid = row_captions(batch, choices, path, table.schema)
    faults: dict[int, tuple[str, str]] = {}
    if captions.null_count:
        detail = f"looked for: {', '.join(map(str, choices))}"
        faults |= dict.fromkeys(np.flatnonzero(captions.is_null()).tolist(), ("no caption", detail))
    faults |= {row: ("caption is not UTF-8", reason) for row, reason in invalid.items()}
    for row in blank_rows(captions).tolist():
        faults[row] = ("empty caption", f"{captions[row].as_buffer().size} bytes of white space")
    if repeats:
        faults |= dict.fromkeys(repeats.find(keys), ("repeated key", "the key occurred before in this table"))
    rows = pa.Table.from_arrays([keys, row_uids(batch, path), *row_sizes(batch), captions], schema=ROWS)
    if faults:
        kept = np.ones(len(rows), bool)
        kept[list(faults)] = False
        rows = rows.filter(pa.array(kept))
    return RowBatch(rows, [Fault(keys[row].as_py(), *faults[row]) for row in sorted(faults)])


# -- the file: Arrow batches of the requested columns


class TableDamaged(Exception):
    """The table cannot be read, or no further; `fault` has the reason, and an empty key."""

    def __init__(self, reason: str, detail: str) -> None:
        self.fault = Fault("", reason, detail)
        super().__init__(detail)


class Table(ABC):
    """`schema`: names and types of the columns; `rows`: their number, None where only reading the table gives it."""

    def __init__(self, shard: Shard, schema: pa.Schema, rows: int | None) -> None:
        self.shard, self.schema, self.rows = shard, schema, rows

    def batches(
        self, columns: Iterable[str], batch_rows: int, faults: list[Fault] | None = None
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """All rows in order, as the number of a batch's first row in the table, and the batch.

        `columns`: at least one. `faults` gets the lines of a CSV that have too few or too many fields; they do not
        count as rows. TableDamaged comes after the last batch that can be read.
        """
        columns = list(dict.fromkeys(columns))
        twice = sorted(name for name in columns if self.schema.names.count(name) > 1)
        if twice:
            problem = f"{self.shard.path} has the column {twice[0]!r} twice"
            raise UserError(problem, allowed="every column once", fix="rename one of them")
        first = 0
        for whole in self._stream(columns, batch_rows, faults):
            for start in range(0, len(whole), batch_rows):
                batch = whole.slice(start, batch_rows)
                yield first, batch
                first += len(batch)

    @abstractmethod
    def _stream(self, columns: list[str], batch_rows: int, faults: list[Fault] | None) -> Iterator[pa.RecordBatch]:
        """Batches of any length."""


def open_table(shard: Shard) -> Table:
    """A table that can be read repeatedly; TableDamaged if the file is none."""
    return _Csv(shard) if shard.kind == "csv" else _Parquet(shard)


class _Parquet(Table):
    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        with self._open() as file:
            super().__init__(shard, file.schema_arrow, file.metadata.num_rows)

    def _stream(self, columns: list[str], batch_rows: int, faults: list[Fault] | None) -> Iterator[pa.RecordBatch]:
        with self._open() as file:
            for run in _runs(file.metadata, batch_rows):
                if len(run) > 1:
                    try:
                        yield from list(_read(file, run, columns, batch_rows))
                        continue
                    except TableDamaged:  # then one by one, up to the damaged one
                        pass
                for group in run:
                    yield from _read(file, [group], columns, batch_rows)

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with self.shard.open() as file:
            with _damage("not a table"):
                # Pages are read as they are needed: a row group with images may be larger than memory.
                table = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True)
            yield table


def _runs(metadata: pq.FileMetaData, batch_rows: int) -> Iterator[list[int]]:
    """Row groups in order: as many as make one batch together, or one. (img2dataset writes groups of 100 rows.)"""
    run, rows = [], 0
    for group in range(metadata.num_row_groups):
        more = metadata.row_group(group).num_rows
        if run and rows + more > batch_rows:
            yield run
            run, rows = [], 0
        run.append(group)
        rows += more
    if run:
        yield run


def _read(file: pq.ParquetFile, groups: list[int], columns: list[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    batches = file.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False)
    while True:
        with _damage("table cut or damaged"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


class _Csv(Table):
    """`delimiter`: of fields. `quoted`: whether quotes enclose fields; if not, they are text, and every line is a row.

    Arrow ends a table at a line that is damaged and not UTF-8. A table that is not all UTF-8 is therefore read as
    Latin-1, in which any bytes are text, and its cells are turned back into their bytes.
    """

    def __init__(self, shard: Shard) -> None:
        with shard.open() as file:
            start = file.read(_HEADER_BYTES)
            _refuse_wide_characters(shard.path, start[:4])
            self._begin = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
            start = start[self._begin :].lstrip(b"\r\n")
            self.delimiter = _delimiter(shard.path, start.partition(b"\n")[0].partition(b"\r")[0])
            quotes = Quotes(self.delimiter)
            file.seek(self._begin)
            self._is_utf8 = _read_all(file, quotes)
        self.quoted, self._broken = quotes.decide(shard.path), quotes.broken
        self._read_as = names = self._names(start)
        if not self._is_utf8:
            names = [name.encode("latin1").decode("utf8", "backslashreplace") for name in names]
        super().__init__(shard, pa.schema([(name, pa.binary()) for name in names]), None)

    def _names(self, start: bytes) -> list[str]:
        """Those in the header, as Arrow reads them."""
        text = io.StringIO(start.decode("utf8" if self._is_utf8 else "latin1", "ignore"), newline="")
        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        try:
            return next(csv.reader(text, delimiter=self.delimiter, quoting=quoting))
        except StopIteration:
            raise TableDamaged("not a table", "the file is empty") from None
        except csv.Error as error:
            raise TableDamaged("not a table", f"the header cannot be read: {error}") from None

    def _stream(self, columns: list[str], batch_rows: int, faults: list[Fault] | None) -> Iterator[pa.RecordBatch]:
        if faults is not None:
            for _, _, first, last in self._broken.tolist():
                detail = f"{{}}: the quote that begins a field in line {first} does not end with the field"
                faults += [
                    Fault("", "row is damaged", detail.format(f"line {line}")) for line in range(first, last + 1)
                ]
        with self._open([self._read_as[self.schema.names.index(name)] for name in columns], faults) as reader:
            while True:
                try:
                    with _damage("table cut or damaged"):
                        batch = reader.read_next_batch()
                except StopIteration:
                    return
                cells = batch.columns if self._is_utf8 else [_from_latin1(column) for column in batch.columns]
                yield pa.record_batch(cells, names=columns)

    @contextmanager
    def _open(self, columns: list[str], faults: list[Fault] | None) -> Iterator[pacsv.CSVStreamingReader]:
        def skip(row: pacsv.InvalidRow) -> str:
            if faults is not None:
                detail = f"line {row.number}: {row.actual_columns} fields, the header has {row.expected_columns}"
                faults.append(Fault("", "row is damaged", detail))
            return "skip"

        with self.shard.open() as file:
            file.seek(self._begin)
            source = io.BufferedReader(WithoutRows(file, self._begin, self._broken)) if len(self._broken) else file
            encoding = "utf8" if self._is_utf8 else "latin1"
            read = pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, encoding=encoding)
            parse = pacsv.ParseOptions(
                delimiter=self.delimiter,
                quote_char='"' if self.quoted else False,
                newlines_in_values=self.quoted,
                invalid_row_handler=skip,
            )
            convert = pacsv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pa.binary()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            )
            with _damage("not a table"):
                reader = pacsv.open_csv(source, read, parse, convert)
            with reader:
                yield reader


def _refuse_wide_characters(path: str, start: bytes) -> None:
    """Refuse UTF-16 and UTF-32, by the byte order mark; UTF-16 of ASCII names also by the zero bytes."""
    encoding = None
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        encoding = "UTF-32"
    elif start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "UTF-16"
    elif len(start) == 4 and start[0::2].count(0) != start[1::2].count(0) and 0 in (any(start[0::2]), any(start[1::2])):
        encoding = "UTF-16LE" if start[0] else "UTF-16BE"
    if encoding:
        command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(path)} > utf8{PurePosixPath(path).suffix}"
        raise UserError(f"{path} is {encoding} text", allowed="UTF-8", fix=f"convert it: {command}")


def _delimiter(path: str, header: bytes) -> str:
    """Tab for .tsv. The header of a .csv decides: open_clip's has tabs, a spreadsheet's may have semicolons."""
    if path.lower().endswith(".tsv"):
        return "\t"
    return next((delimiter for delimiter in ",\t;" if delimiter.encode() in header), ",")


def _read_all(file: BinaryIO, quotes: Quotes) -> bool:
    """Add the rest of a file to `quotes`; whether it is UTF-8."""
    decoder, is_utf8 = codecs.getincrementaldecoder("utf8")(), True
    while True:
        part = file.read(_READ_BYTES)
        if is_utf8 and not (part.isascii() and not decoder.getstate()[0] and part):
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError:
                is_utf8 = False
        if not part:
            return is_utf8
        quotes.add(part)


def _from_latin1(column: pa.Array) -> pa.BinaryArray:
    return pa.array(
        [None if cell is None else cell.decode("utf8").encode("latin1") for cell in column.to_pylist()], pa.binary()
    )


@contextmanager
def _damage(reason: str) -> Iterator[None]:
    """Arrow's errors about the content as TableDamaged; what the system refuses passes unchanged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if not isinstance(error, pa.ArrowException) and error.errno is not None:
            raise
        raise TableDamaged(reason, " ".join(str(error).split())) from None


# -- repeated keys: exact, in one reading as long as no hash repeats
#
# keys -> 64-bit hashes -> a set; the first hash that is there already -> all keys are read again: hashes that occur
#      twice -> only keys with such a hash are compared as strings, in the table's order


_START, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x9E3779B97F4A7C15)
_LOW = np.uint64(20)
_READAHEAD = 16
_FIRST_SLOTS = 1 << 16


class Repeats:
    """Finds repeated keys, batch by batch, for 16 to 32 bytes of memory a row.

    `reread`: all keys of the table in its order, in batches; called only when a hash has come twice.
    """

    def __init__(self, reread: Callable[[], Iterable[pa.StringArray]]) -> None:
        self._reread = reread
        self._hashes = np.zeros(_FIRST_SLOTS, np.uint64)
        self._rows = 0
        self._twice: _Twice | None = None

    def find(self, keys: pa.StringArray) -> list[int]:
        """Rows of the next batch whose key occurred before; batches have to come in the table's order."""
        if self._twice is None:
            while 2 * (self._rows + len(keys)) > len(self._hashes):
                larger = np.zeros(4 * len(self._hashes), np.uint64)
                _add_all(larger, self._hashes)
                self._hashes = larger
            if not _add_all(self._hashes, _hashes(keys)):
                self._rows += len(keys)
                return []
            self._twice = _Twice(self._reread(), self._reread(), self._rows)
        return self._twice.find(keys)


class _Twice:
    """`Repeats` after a repeated hash: compares keys with such a hash. Of the keys `before`, `rows` have been seen."""

    def __init__(self, keys: Iterable[pa.StringArray], before: Iterable[pa.StringArray], rows: int) -> None:
        hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *map(_hashes, keys)]))
        self._hashes = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        self._seen: set[str] = set()
        for part in before:
            self.find(part.slice(0, rows))
            rows -= min(rows, len(part))
            if not rows:
                break

    def find(self, keys: pa.StringArray) -> list[int]:
        repeated = []
        for row in np.flatnonzero(np.isin(_hashes(keys), self._hashes)):
            key = keys[row].as_py()
            if key in self._seen:
                repeated.append(int(row))
            self._seen.add(key)
        return repeated


@njit(nogil=True, cache=True)
def _add_all(slots: np.ndarray, hashes: np.ndarray) -> bool:
    """Add hashes (0 is an empty slot) to an open-addressing set; whether any was there already."""
    mask, repeated = len(slots) - 1, False
    for row in range(len(hashes)):
        next_hash = hashes[min(row + _READAHEAD, len(hashes) - 1)]
        # numba gives the first argument of an intrinsic itself
        prefetch(slots, np.int64(next_hash >> _LOW) & mask)  # pyright: ignore[reportCallIssue]
        value = hashes[row]
        if value == 0:
            continue
        slot = np.int64(value >> _LOW) & mask
        while slots[slot] != 0 and slots[slot] != value:
            slot = (slot + 1) & mask
        repeated |= slots[slot] == value
        slots[slot] = value
    return repeated


def _hashes(strings: pa.StringArray) -> np.ndarray:
    return _hash_each(*offsets_and_bytes(strings))


@njit(nogil=True, cache=True)
def _hash_each(offsets: np.ndarray, text: np.ndarray) -> np.ndarray:
    """uint64 [N] of strings as int32 [N + 1] offsets into uint8 [B], eight bytes at a time."""
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for row in range(len(hashes)):
        begin, end = np.int64(offsets[row]), np.int64(offsets[row + 1])
        value = _START ^ np.uint64(end - begin)
        while begin + 8 <= end:
            value = _mixed(value, load(text, begin))  # pyright: ignore[reportCallIssue]
            begin += 8
        rest = np.uint64(0)
        for i in range(begin, end):
            rest = (rest << np.uint64(8)) | np.uint64(text[i])
        hashes[row] = _mixed(value, rest) | np.uint64(1)  # never 0
    return hashes


@njit(nogil=True, forceinline=True)
def _mixed(value: Scalar, more: Scalar) -> Scalar:
    value = (value ^ more) * _PRIME
    return value ^ (value >> np.uint64(32))
