"""Rows of results -> tables, with the paper's figures (published.json) next to them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from labels.html import Html, details, join, paragraph, table, tag
from train.evals.protocol import format_metric
from train.evals.results import Row
from train.report.runs import Run

_COLUMN_NAMES = {"probe": "linear probe", "zeroshot": "zero-shot after LiT"}


@dataclass(frozen=True)
class Benchmark:
    """Published figures of one protocol: name, percent (CIDEr: x 100).

    Attributes:
        data: the kinds of data (`--data KIND:DIR`) whose tables show them.
        protocol: the variant, as results name it.
    """

    data: list[str]
    protocol: str
    title: str
    rows: list[tuple[str, float]]


@dataclass(frozen=True)
class Line:
    """A line of an ablation: `published` figures by column; `where`: keys of the runs of this line (see `matches`),
    empty: none.
    """

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
    """The content of published.json."""

    source: str
    benchmarks: list[Benchmark]
    ablations: list[Ablation]


def published() -> Published:
    """Read published.json."""
    content = json.loads(resources.files("train.report").joinpath("published.json").read_text("utf8"))
    benchmarks = [
        Benchmark(**{**one, "rows": [(name, value) for name, value in one["rows"]]}) for one in content["benchmarks"]
    ]
    ablations = [Ablation(**{**one, "rows": [Line(**line) for line in one["rows"]]}) for one in content["ablations"]]
    return Published(content["source"], benchmarks, ablations)


def is_of(row: Row, data: Sequence[str], protocol: str) -> bool:
    """Whether a row is of one of these kinds of data (`imagenet:DIR`), and of that protocol or a variant of it."""
    return row.data.partition(":")[0] in data and is_variant(row, protocol)


def is_variant(row: Row, protocol: str) -> bool:
    """Whether a row is of a protocol or a variant of it, e.g. `probe, MAE's recipe`; a suite writes its name and a
    colon first.
    """
    return row.variant.rpartition(": ")[2].partition(",")[0].partition(" (")[0] == protocol


def matches(run: Run, line: Line) -> bool:
    """Whether a run's recipe has all values of a line; a line that names no method means `train run`."""
    where = {"data.method": "superclass"} | line.where
    return bool(line.where) and all(run.recipe.get(key) == wanted for key, wanted in where.items())


@dataclass(frozen=True)
class AblationResults:
    """Own results for an ablation: `columns` (data, variant); `cells`: one row for each line, in the order of the
    columns.
    """

    columns: list[tuple[str, str]]
    cells: list[list[str]]


def measured(ablation: Ablation, runs: Sequence[Run], rows: Sequence[Row]) -> AblationResults | None:
    """Own results for an ablation; None if fewer than two of its lines have a run, which would compare nothing.

    Several runs of a line (seeds) give mean ± standard deviation (n - 1).
    """
    kinds = [{run.path.resolve() for run in runs if matches(run, line)} for line in ablation.rows]
    own = [row for row in rows if row.run and any(is_variant(row, column) for column in ablation.columns)]
    columns = list(dict.fromkeys((row.data, row.variant) for row in own if any(row.run in kind for kind in kinds)))
    cells = [
        [_cell([row for row in own if row.run in kind and (row.data, row.variant) == column]) for column in columns]
        for kind in kinds
    ]
    return AblationResults(columns, cells) if sum(any(cell != "-" for cell in line) for line in cells) > 1 else None


def _cell(rows: list[Row]) -> str:
    values = [value for row in rows if (value := row.metrics[row.main][0]) is not None]
    if not values:
        return "-"
    name, mean = rows[0].main, statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else rows[0].metrics[name][1]
    runs = f", {len(values)} runs" if len(values) > 1 else ""
    return format_metric(name, mean) + (f" ± {format_metric(name, spread)}{runs}" if spread is not None else "")


def measured_tables(rows: Sequence[Row], paper: Published) -> Html:
    """A table for each data set: a row for each encoder, a column for each variant of a protocol."""
    if not rows:
        return paragraph(
            "No results: add --results with result JSONs (of train probe, fewshot, finetune, caption, eval), or their folder."
        )
    blocks = [
        _block(data, [row for row in rows if row.data == data], paper.benchmarks)
        for data in dict.fromkeys(row.data for row in rows)
    ]
    units = "Accuracies and recalls in percent; ± is the standard deviation over seeds."
    return join([paragraph(units, muted=True), *blocks, details("All metrics", _all_metrics(rows))])


def paper_tables(runs: Sequence[Run], rows: Sequence[Row], paper: Published) -> Html:
    """The paper's ablations, with own results where runs differ in the same key."""
    text = (
        "As published, in percent. If two or more of the runs above differ in what a table compares, the table shows their results too. "
        "They are of another size and other data: compare the order, not the values."
    )
    return join(
        [paragraph(text), *(_ablation(one, runs, rows) for one in paper.ablations), paragraph(paper.source, muted=True)]
    )


def _block(data: str, rows: Sequence[Row], benchmarks: Sequence[Benchmark]) -> Html:
    encoders, variants = (
        dict.fromkeys(row.encoder for row in rows),
        dict.fromkeys(row.variant for row in rows if row.variant != row.encoder),
    )
    cells = {(row.encoder, row.variant): row for row in rows}
    lines = []
    for encoder in encoders:
        row_cells = [cells.get((encoder, variant)) or cells.get((encoder, encoder)) for variant in variants]
        lines.append([tag("code", encoder), *(_value(row, row.main) if row else "-" for row in row_cells)])
    names = [f"#{variant}" + (f" ({metric})" if (metric := _metric(rows, variant)) else "") for variant in variants]
    matching = [
        benchmark for benchmark in benchmarks if any(is_of(row, benchmark.data, benchmark.protocol) for row in rows)
    ]
    published_tables = [
        table(["Published", "#Figure"], benchmark.rows, caption=f"Published: {benchmark.title}")
        for benchmark in matching
    ]
    return join(
        [
            tag("h3", data),
            table(["Encoder", *names], lines, caption="Measured", label=f"Measured on {data}"),
            *published_tables,
        ]
    )


def _metric(rows: Sequence[Row], variant: str) -> str:
    """The main metric's name; empty for top-1 accuracy."""
    return next(("" if row.main == "top1" else row.main for row in rows if row.variant == variant), "")


def _value(row: Row, name: str) -> str:
    mean, spread = row.metrics[name]
    return format_metric(name, mean) + (f" ± {format_metric(name, spread)}" if spread is not None else "")


def _all_metrics(rows: Sequence[Row]) -> Html:
    lines = [
        [
            row.data,
            tag("code", row.encoder),
            row.variant,
            name,
            _value(row, name),
            row.seeds or "-",
            tag("span", row.protocol, class_="long"),
        ]
        for row in rows
        for name in row.metrics
    ]
    return table(
        ["Data", "Encoder", "Variant", "Metric", "#Value", "#Seeds", "Protocol"],
        lines,
        caption="Every metric of every result",
    )


def _published(value: float | None) -> str:
    """With the decimals of the publication, at least one."""
    return "-" if value is None else max(f"{value:.1f}", f"{value:g}", key=len)


def _ablation(ablation: Ablation, runs: Sequence[Run], rows: Sequence[Row]) -> Html:
    own = measured(ablation, runs, rows)
    columns = ["", *(f"#{_COLUMN_NAMES[column]}, published" for column in ablation.columns)]
    columns += [f"#{variant} on {data}, these runs" for data, variant in own.columns] if own else []
    lines = []
    for place, line in enumerate(ablation.rows):
        numbers = [_published(value) for value in line.published]
        lines.append([line.name, *numbers, *(own.cells[place] if own else [])])
    return join(
        [
            tag("h3", ablation.title),
            table(columns, lines, caption=ablation.setting, label=f"{ablation.title}: {ablation.setting}"),
        ]
    )
