"""`preprocess sql`: read-only SQL over a label dataset's tables, with no access to anything outside of its folder.

`open_tables` -> a locked-down connection of DuckDB -> `run_query` -> the rows as a table, CSV or JSON
"""

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import duckdb
from rich.console import Console
from rich.table import Table

from labels.storage import Layout, UserError, is_remote, local_copy
from labels.subset import quoted

Format = Literal["table", "csv", "json"]
_ROWS_AT_ONCE = 10_000
_TABLE_ROWS = 1_000
_ALLOWED = "one SELECT (also WITH, FROM, DESCRIBE, SHOW, SUMMARIZE) over tokens, corpus, shards and labels"


@contextmanager
def open_tables(out: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A locked-down connection: tables tokens, corpus, shards, view labels; nothing else can be read or written."""
    layout = Layout(out if is_remote(out) else out.resolve())
    if not layout.idf_duckdb.is_file():
        raise UserError(f"{out} has no idf.duckdb", fix=f"run `preprocess build-labels DATA --out {out}` first")
    verify = "run `preprocess verify` on this folder"
    with local_copy(layout.idf_duckdb) as database:
        try:
            con = duckdb.connect(str(database), read_only=True)
        except duckdb.Error as error:
            raise UserError(f"{layout.idf_duckdb} cannot be opened: {error}", fix=verify) from None
        with con:
            if is_remote(layout.out):
                con.register_filesystem(layout.out.fs)  # type: ignore[attr-defined]  # a UPath
            # The file's own view has a relative path, which a locked-down DuckDB resolves from the working directory.
            try:
                files = quoted(layout.labels / "*.parquet")
                con.execute(f"CREATE TEMP VIEW labels AS SELECT * FROM read_parquet({files})")
            except duckdb.Error as error:
                raise UserError(f"{layout.labels} cannot be read: {error}", fix=verify) from None
            con.execute(f"SET allowed_directories = [{quoted(layout.out)}]")
            con.execute("SET enable_external_access = false")
            con.execute("SET lock_configuration = true")
            yield con


def run_query(out: Path, query: str, form: Format) -> None:
    """Run one query that only reads, and print its rows as a table, CSV or JSON (a list of objects)."""
    with open_tables(out) as con:
        try:
            # COPY could still write files inside the folder: only statements that cannot write are run.
            statements = con.extract_statements(query)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
                raise UserError(f"the query is not one that only reads: {kinds}", allowed=_ALLOWED)
            result = con.execute(statements[0])
            names = [column[0] for column in result.description or []]
            _PRINTERS[form](names, result, sys.stdout)
        except duckdb.Error as error:
            raise UserError(f"the query failed: {error}", allowed=_ALLOWED) from None


def _batches(result: duckdb.DuckDBPyConnection) -> Iterator[list[tuple[Any, ...]]]:
    while batch := result.fetchmany(_ROWS_AT_ONCE):
        yield batch


def _print_csv(names: list[str], result: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(names)
    for batch in _batches(result):
        writer.writerows(batch)


def _print_json(names: list[str], result: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    separator = "["
    for batch in _batches(result):
        for row in batch:
            stream.write(separator + json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=str))
            separator = ",\n "
    stream.write("]\n" if separator != "[" else "[]\n")


def _print_table(names: list[str], result: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")  # wrapped, never shortened
    rows = result.fetchmany(_TABLE_ROWS)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console(file=stream, markup=False, emoji=False, highlight=False)
    console.print(table)
    if len(rows) == _TABLE_ROWS and result.fetchone() is not None:
        console.print(f"only the first {_TABLE_ROWS} rows are shown; --format csv or json gives all")


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_PRINTERS = {"table": _print_table, "csv": _print_csv, "json": _print_json}
