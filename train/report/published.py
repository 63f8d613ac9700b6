"""The paper's numbers (published.json), and what runs here that differ in the same thing came to."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from train.report.results import Row, told
from train.report.runs import Run


@dataclass(frozen=True)
class Benchmark:
    """Published figures of one protocol: name, percent (CIDEr: x 100).

    Attributes:
        data: kinds of data (`--data KIND:DIR`) that they stand beside.
        protocol: the variant, as results name it.
    """

    data: list[str]
    protocol: str
    title: str
    rows: list[tuple[str, float]]


@dataclass(frozen=True)
class Line:
    """A line of an ablation: `published` for each column, and which runs here are of that kind (see `matches`); none where it is empty."""

    name: str
    published: list[float | None]
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """A table of the paper; `columns` are protocols."""

    title: str
    setting: str
    columns: list[str]
    rows: list[Line]


@dataclass(frozen=True)
class Published:
    """The whole file."""

    source: str
    benchmarks: list[Benchmark]
    ablations: list[Ablation]


def published() -> Published:
    """What the paper says."""
    content = json.loads(resources.files("train.report").joinpath("published.json").read_text("utf8"))
    benchmarks = [Benchmark(**{**one, "rows": [(name, value) for name, value in one["rows"]]}) for one in content["benchmarks"]]
    ablations = [Ablation(**{**one, "rows": [Line(**line) for line in one["rows"]]}) for one in content["ablations"]]
    return Published(content["source"], benchmarks, ablations)


def is_of(row: Row, data: Sequence[str], protocol: str) -> bool:
    """Whether a row is of one of these kinds of data (`imagenet:DIR`) and of that protocol, or of one of its variants."""
    return row.data.partition(":")[0] in data and is_variant(row, protocol)


def is_variant(row: Row, protocol: str) -> bool:
    """Whether a row is of a protocol: `probe` is, and so is `probe, MAE's recipe`; a suite's own name stands before a colon."""
    return row.variant.rpartition(": ")[2].partition(",")[0].partition(" (")[0] == protocol


def matches(run: Run, line: Line) -> bool:
    """Whether a run is of a line's kind: its recipe has all the values; where the line names no method, that of `train run`."""
    where = {"data.method": "superclass"} | line.where
    return bool(line.where) and all(run.recipe.get(key) == wanted for key, wanted in where.items())


@dataclass(frozen=True)
class Measured:
    """Columns of an ablation as runs here came to it: (data, variant), and each line's cells in that order."""

    columns: list[tuple[str, str]]
    cells: list[list[str]]


def measured(ablation: Ablation, runs: Sequence[Run], rows: Sequence[Row]) -> Measured | None:
    """What runs here came to, line by line; None where fewer than two lines have a run, since one alone compares nothing.

    Runs of one line (other seeds) are told as mean ± deviation (n - 1).
    """
    kinds = [{run.path.resolve() for run in runs if matches(run, line)} for line in ablation.rows]
    mine = [row for row in rows if row.run and any(is_variant(row, column) for column in ablation.columns)]
    columns = list(dict.fromkeys((row.data, row.variant) for row in mine if any(row.run in kind for kind in kinds)))
    cells = [
        [_cell([row for row in mine if row.run in kind and (row.data, row.variant) == column]) for column in columns] for kind in kinds
    ]
    return Measured(columns, cells) if sum(any(cell != "-" for cell in line) for line in cells) > 1 else None


def _cell(rows: list[Row]) -> str:
    values = [value for row in rows if (value := row.metrics[row.main][0]) is not None]
    if not values:
        return "-"
    name, mean = rows[0].main, statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else rows[0].metrics[name][1]
    runs = f", {len(values)} runs" if len(values) > 1 else ""
    return told(name, mean) + (f" ± {told(name, spread)}{runs}" if spread is not None else "")
