"""A Parquet, CSV or TSV file as a stream of Arrow batches with the columns that are asked for, in bounded memory.

CSV needs a header line; every column comes as binary, an empty cell that is not quoted as null.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from labels.errors import UserError
from preprocess.readers.base import Fault
from preprocess.readers.shards import Shard

_BLOCK_BYTES = 1 << 24  # of CSV, at once in memory; also the longest row that can be read
_READ_BYTES = 1 << 20


class TableDamaged(Exception):
    """The table cannot be read, or no further; `fault` says why, with an empty key."""

    def __init__(self, reason: str, detail: str) -> None:
        self.fault = Fault("", reason, detail)
        super().__init__(detail)


class Table(ABC):
    """An open_table(). `schema`: names and types of its columns; `rows`: how many it has, None where only reading it tells."""

    def __init__(self, shard: Shard, schema: pa.Schema, rows: int | None) -> None:
        self.shard, self.schema, self.rows = shard, schema, rows

    def batches(self, columns: Iterable[str], batch_rows: int, faults: list[Fault] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """All rows in order: the number of a batch's first row in the table, and the batch.

        Args:
            columns: at least one of the schema.
            batch_rows: rows of a batch at most.
            faults: where lines of a CSV that have too few or too many fields are told; such lines do not count as rows.

        Raises:
            TableDamaged: after the last batch that can be read.
            UserError: a column that is there twice.
        """
        columns = list(dict.fromkeys(columns))
        twice = sorted(name for name in columns if self.schema.names.count(name) > 1)
        if twice:
            problem = f"{self.shard.path} has the column {twice[0]!r} twice"
            raise UserError(problem, allowed="every column once", mend="rename one of them")
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
    """A table to read, as often as one likes.

    Raises:
        TableDamaged: it is none.
    """
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
    """Arrow gives a table up at a line that is damaged and not UTF-8. A table that is not all UTF-8 is therefore read as
    Latin-1, in which any bytes are text, and its cells are turned back into what they were."""

    def __init__(self, shard: Shard) -> None:
        self._is_utf8 = _is_utf8(shard)
        with shard.open() as file:
            self._begin = 3 if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(self._begin)
            header = file.readline(1 << 16)
        # A .csv whose header holds tabs and no comma is as open_clip's.
        self._delimiter = "\t" if shard.path.endswith(".tsv") or (b"\t" in header and b"," not in header) else ","
        self.shard = shard
        with self._open([], None) as reader:
            self._read_as = reader.schema.names
        names = [name if self._is_utf8 else name.encode("latin1").decode("utf8", "backslashreplace") for name in self._read_as]
        super().__init__(shard, pa.schema([(name, pa.binary()) for name in names]), None)

    def _stream(self, columns: list[str], batch_rows: int, faults: list[Fault] | None) -> Iterator[pa.RecordBatch]:
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
        """No columns: all of them."""

        def skip(row: pacsv.InvalidRow) -> str:
            if faults is not None:
                detail = f"line {row.number}: {row.actual_columns} fields, the header has {row.expected_columns}"
                faults.append(Fault("", "row is damaged", detail))
            return "skip"

        with self.shard.open() as file:
            file.seek(self._begin)
            encoding = "utf8" if self._is_utf8 else "latin1"
            read = pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, encoding=encoding)
            parse = pacsv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=skip)
            kinds = dict.fromkeys(columns, pa.binary())
            convert = pacsv.ConvertOptions(
                include_columns=columns, column_types=kinds, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
            )
            with _damage("not a table"):
                reader = pacsv.open_csv(file, read, parse, convert)
            with reader:
                yield reader


def _is_utf8(shard: Shard) -> bool:
    decoder = codecs.getincrementaldecoder("utf8")()
    with shard.open() as file:
        try:
            for part in _parts(file):
                decoder.decode(part)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _parts(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(_READ_BYTES):
        yield part


def _from_latin1(column: pa.Array) -> pa.BinaryArray:
    return pa.array([None if cell is None else cell.decode("utf8").encode("latin1") for cell in column.to_pylist()], pa.binary())


@contextmanager
def _damage(reason: str) -> Iterator[None]:
    """Arrow's complaints about the content as TableDamaged; what the system refuses passes as it is."""
    try:
        yield
    except pa.ArrowException as error:
        raise TableDamaged(reason, _line(error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise TableDamaged(reason, _line(error)) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
