"""Rows of results as tables on the terminal, and as Markdown."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from train.evals.measure import MAJORITY
from train.evals.protocol import format_metric, is_share

_WIDEST = 1000


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """One protocol on one data set: a line for each encoder and variant; the main metric with its spreads, then the others."""
    several = len({row["variant"] for row in rows} - {MAJORITY}) > 1
    main, *others = rows[-1]["metrics"]
    table = Table(title=title)
    words = ["encoder", *(["variant"] if several else [])]
    main_column, *other_columns = (f"{name} %" if is_share(name) else name for name in (main, *others))
    for column in (*words, main_column, "± seeds", "± test size", *other_columns, "seconds"):
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    for row in rows:
        values = [format_metric(key, row.get(key)) for key in (main, f"{main}_std", f"{main}_standard_error", *others)]
        table.add_row(*(row[word] for word in words), *values, f"{row['seconds']:.0f}" if "seconds" in row else "-")
    _show(table)


class Grid:
    """Encoders down, variants across, one block a data set: what a suite ends with."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """`rows` have `data`, `encoder`, `variant`, and the first of their `metrics` with its `_std`; a cell without a row is `-`."""
        self._cells = {(row["data"], row["encoder"], row["variant"]): row for row in rows}
        self._lines = list(dict.fromkeys((row["data"], row["encoder"]) for row in rows))
        self._variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != MAJORITY]

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        return ["data", "encoder", *self._variants]

    def lines(self) -> list[list[str]]:
        """Text of every cell, line by line."""
        return [[data, encoder, *(self._cell(data, encoder, variant) for variant in self._variants)] for data, encoder in self._lines]

    def _cell(self, data: str, encoder: str, variant: str) -> str:
        row = self._cells.get((data, encoder, variant)) or self._cells.get((data, encoder, MAJORITY))
        if row is None:
            return "-"
        main = row["metrics"][0]
        spread = f" ± {format_metric(main, row[f'{main}_std'])}" if row[f"{main}_std"] is not None else ""
        return format_metric(main, row[main]) + spread

    def print(self, title: str) -> None:
        """On the terminal."""
        table = Table(title=title)
        for column in self.header:
            table.add_column(column, justify="left" if column in ("data", "encoder") else "right", overflow="fold")
        before = ""
        for data, *cells in self.lines():
            if before and data != before:
                table.add_section()
            table.add_row(data if data != before else "", *cells)
            before = data
        _show(table)

    def markdown(self) -> str:
        """As a Markdown table."""
        rule = ["---" if column in ("data", "encoder") else "---:" for column in self.header]
        return "".join("| " + " | ".join(line) + " |\n" for line in (self.header, rule, *self.lines()))


def _show(table: Table) -> None:
    """As wide as its text where nothing limits it: a log, a pipe. A terminal folds."""
    console = Console()
    wide = Console(width=_WIDEST)
    (console if console.is_terminal else Console(width=wide.measure(table).maximum)).print(table)
