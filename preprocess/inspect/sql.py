"""`preprocess sql`: read-only SQL over a label dataset's tables, with no access to anything outside of its folder.

`open_tables` -> a locked-down connection of DuckDB -> `run_query` -> the rows as a table, CSV or JSON
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TextIO

import duckdb
from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Console
from rich.table import Table

from labels.idf import read_visual
from labels.show.terminal import visible
from labels.storage import Layout, UserError, is_remote, library_path, local_copy
from labels.subset import quoted

Format = Literal["table", "csv", "json"]
_ROWS_AT_ONCE = 10_000
_TABLE_ROWS = 1_000
_ALLOWED = "one SELECT (also WITH, FROM, DESCRIBE, SHOW, SUMMARIZE) over tokens, corpus, shards and labels"


@contextmanager
def open_tables(out: Path, visual: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A locked-down connection: tables tokens, corpus, shards, view labels; nothing else can be read or written.

    `visual`: a table of `train weigh`, whose columns `tokens` then has too.
    """
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
                files = quoted(library_path(layout.labels) / "*.parquet")
                con.execute(f"CREATE TEMP VIEW labels AS SELECT * FROM read_parquet({files})")
            except duckdb.Error as error:
                raise UserError(f"{layout.labels} cannot be read: {error}", fix=verify) from None
            if visual:
                _join_visual(con, visual)
            con.execute(f"SET allowed_directories = [{quoted(library_path(layout.out))}]")
            con.execute("SET enable_external_access = false")
            con.execute("SET lock_configuration = true")
            yield con


def _join_visual(con: duckdb.DuckDBPyConnection, visual: Path) -> None:
    con.register("visual", read_visual(visual)[0].drop_columns(["token", "document_frequency", "idf"]))
    con.execute("CREATE TEMP TABLE weights AS SELECT * FROM visual")
    con.execute("CREATE TEMP VIEW tokens AS SELECT * FROM idf.tokens LEFT JOIN weights USING (token_id)")


def run_query(out: Path, query: str, form: Format, visual: Path | None = None) -> None:
    """Run one query that only reads, and print its rows as a table, CSV or JSON (a list of objects)."""
    with open_tables(out, visual) as con:
        try:
            # COPY could still write files inside the folder: only statements that cannot write are run.
            # In the C locale the bytes of arguments that are not ASCII arrive as surrogates.
            query = query.encode("utf8", "surrogateescape").decode("utf8", "replace")
            statements = con.extract_statements(query)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                kinds = ", ".join(statement.type.name for statement in statements) or "nothing"
                raise UserError(f"the query is not one that only reads: {kinds}", allowed=_ALLOWED)
            result = con.execute(statements[0])
            names = [column[0] for column in result.description or []]
            if form != "table" and isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
                sys.stdout.reconfigure(encoding="utf8")  # data for a program, whatever the terminal's encoding is
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
        writer.writerows([map(_shown, row) for row in batch] if stream.isatty() else batch)


def _print_json(names: list[str], result: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    separator = "["
    for batch in _batches(result):
        for row in batch:
            text = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=str)
            stream.write(separator + (visible(text) if stream.isatty() else text))
            separator = ",\n "
    stream.write("]\n" if separator != "[" else "[]\n")


def _print_table(names: list[str], result: duckdb.DuckDBPyConnection, stream: TextIO) -> None:
    rows = result.fetchmany(_TABLE_ROWS)
    cells = [[visible(name) for name in names], *([visible(_cell(value)) for value in row] for row in rows)]
    console = Console(file=stream, markup=False, emoji=False, highlight=False)
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if sum(widths) + 3 * len(widths) + 1 <= console.width:
        table = Table(*cells[0])
        for row in cells[1:]:
            table.add_row(*row)
        console.print(table)
    else:
        stream.writelines(_records(cells[0], cells[1:], console.width))
    if len(rows) == _TABLE_ROWS and result.fetchone() is not None:
        console.print(f"only the first {_TABLE_ROWS} rows are shown; --format csv or json gives all")


def _records(names: list[str], rows: list[list[str]], width: int) -> Iterator[str]:
    """Lines of at most `width` columns: a block for each row, a line for each of its columns; long text is wrapped."""
    left = min(max(map(cell_len, names)), width // 2)
    for number, row in enumerate(rows, start=1):
        yield f"-[ record {number} ]".ljust(width, "-") + "\n"
        for name, cell in zip(names, row, strict=True):
            parts = chop_cells(name, left), chop_cells(cell, max(width - left - 3, 2))
            for name_part, cell_part in zip_longest(*parts, fillvalue=""):
                yield f"{set_cell_size(name_part, left)} | {cell_part}".rstrip() + "\n"
    if not rows:
        yield f"no rows; columns: {', '.join(names)}\n"


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) else value


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_PRINTERS = {"table": _print_table, "csv": _print_csv, "json": _print_json}
