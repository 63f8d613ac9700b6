"""The page of `train report`: runs and result rows -> one HTML file with curves, recipes and tables.

`Run`s (train/report/runs.py) give the sections loss, speed and recipe; `Row`s (train/evals/measure.py) the tables of
results. published.json has the paper's figures: benchmarks are shown next to results of the same protocol and kind of
data. A line of an ablation names, by recipe keys, the runs that it can be compared with; a table gets a column for
the user's runs where two of its lines have a run, so that a change of one key is compared with the same change in the
paper, at any size.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

from labels.show import html
from labels.show.html import Axis, Html, Section, format_seconds, join, key_name, paragraph, short_number, table, tag
from labels.show.terminal import count
from train.evals.measure import Row
from train.evals.paired import HEADER, compare
from train.evals.protocol import format_metric
from train.report.runs import Run, differences, loss_curves, throughput_curves, validation_curves
from train.report.visual import visual_sections

_LINES_NAMED = 10


def report_page(runs: Sequence[Run], results: Sequence[Row]) -> str:
    """The whole HTML file; `results` may contain encoders other than `runs`."""
    paper = published()
    damaged = [paragraph(text) for run in runs if (text := damaged_lines(run))]
    sections = [
        Section("loss", "Loss", _loss(runs)),
        Section("speed", "Throughput", _speed(runs)),
        *visual_sections(runs),
        Section("recipe", "Recipe", _recipe(runs)),
        Section("results", "Results", measured_tables(results, paper)),
        Section("paper", "The paper's tables", paper_tables(runs, results, paper)),
    ]
    if len(runs) == 1:
        return html.page(f"Run {runs[0].name}", join([_tiles(runs[0]), *damaged]), sections)
    lead = join([paragraph(", ".join(run.name for run in runs)), *damaged])
    return html.page(count(len(runs), "run"), lead, [_overview(runs), *sections])


def damaged_lines(run: Run) -> str | None:
    """The lines of its metrics that the page lacks, in words; None if there are none."""
    if not run.damaged:
        return None
    first = ", ".join(map(str, run.damaged[:_LINES_NAMED])) + (", ..." if len(run.damaged) > _LINES_NAMED else "")
    return f"{run.path / 'metrics.jsonl'}: damaged lines, not shown ({len(run.damaged):,}): {first}"


def _numbers(run: Run) -> dict[str, str]:
    """What the tiles of one run and the table of several show of each, formatted; a dash for what is unknown."""
    rate, wait, mfu = (run.weighted_mean(key) for key in ("samples_per_s", "data_wait", "mfu"))
    formats = {"loss": (run.last_loss(), "{:.3f}"), "rate": (rate, "{:,.0f}"), "wait": (wait, "{:.1%}")}
    formats["mfu"] = (mfu, "{:.1%}")
    return {key: "-" if value is None else form.format(value) for key, (value, form) in formats.items()}


def _tiles(run: Run) -> Html:
    numbers, skipped, bad = _numbers(run), run.skipped, run.bad_images
    no_peak = "unknown: the device's peak is not known" if numbers["mfu"] == "-" else ""
    return html.tiles(
        [
            ("Samples seen", f"{run.samples:,}", f"{run.samples / run.budget:.0%} of the budget"),
            ("Loss", numbers["loss"], "nats, mean of the last 1% of steps"),
            ("Throughput", numbers["rate"], f"samples/s; {format_seconds(run.seconds())} in the loop"),
            ("Data wait", numbers["wait"], "of the time"),
            ("MFU", numbers["mfu"], no_peak),
            ("Faults", f"{skipped + bad:,}", f"{skipped:,} steps skipped, {bad:,} bad images"),
        ]
    )


def _overview(runs: Sequence[Run]) -> Section:
    rows = []
    for run in runs:
        numbers, seen = _numbers(run), f"{short_number(run.samples)} ({run.samples / run.budget:.0%})"
        speed = [format_seconds(run.seconds()), numbers["rate"], numbers["wait"], numbers["mfu"]]
        rows.append([run.name, seen, numbers["loss"], *speed, f"{run.skipped:,}", f"{run.bad_images:,}"])
    columns = ["Run", "#Samples seen", "#Loss (nats)", "#Time", "#Samples/s", "#Data wait", "#MFU"]
    columns += ["#Skipped steps", "#Bad images"]
    note = "Loss: mean of the last 1% of steps. Losses of different kinds or of different labels cannot be compared."
    return Section("runs", "Runs", join([table(columns, rows, caption="All runs"), paragraph(note, muted=True)]))


def _loss(runs: Sequence[Run]) -> Html:
    """A chart for each kind of loss, since values of different losses cannot be compared."""
    note = "The mean of neighbouring steps" + (", and each step (faint)" if len(runs) == 1 else "")
    kinds = dict.fromkeys(run.recipe["train.loss.name"] for run in runs)
    charts, x = [], Axis("samples seen", low=0.0)
    for kind in kinds:
        suffix = f": {kind}" if len(kinds) > 1 else ""
        of_kind = [run for run in runs if run.recipe["train.loss.name"] == kind]
        if curves := loss_curves(runs, of_kind):
            charts.append(html.line_chart(f"Loss over samples seen{suffix}", x, Axis("loss (nats)"), curves, note=note))
        if curves := validation_curves(runs, of_kind, "validation_loss"):
            title, y = f"Validation loss over samples seen{suffix}", Axis("validation loss (nats)")
            charts.append(html.line_chart(title, x, y, curves, note="Of held-out samples, with IDF as the weights."))
    if curves := validation_curves(runs, runs, "validation_gain"):
        title, y = "Validation gain over samples seen", Axis("nats below the best constant")
        note = "How much lower the validation loss is than that of the best constant prediction."
        charts.append(html.line_chart(title, x, y, curves, note=note))
    return join(charts) if charts else paragraph("No step is logged yet.")


def _speed(runs: Sequence[Run]) -> Html:
    charts = []
    for title, key, label, factor in (
        ("Throughput", "samples_per_s", "samples/s", 1.0),
        ("Time spent waiting for data", "data_wait", "% of the time", 100.0),
        ("Model FLOPs utilisation (MFU)", "mfu", "% of the device's peak", 100.0),
    ):
        curves = throughput_curves(runs, key, factor)
        if curves:
            top = max(max(curve.ys) for curve in curves)
            axes = Axis("samples seen", low=0.0), Axis(label, low=0.0, high=top * 1.05 or 1.0)
            charts.append(html.line_chart(title, *axes, curves))
    if not charts:
        return paragraph("No throughput is logged yet.")
    if all(run.weighted_mean("mfu") is None for run in runs):
        charts.append(paragraph("No MFU: the device's peak is not known; set train.runtime.peak_tflops.", muted=True))
    return join(charts)


def _recipe(runs: Sequence[Run]) -> Html:
    rows = [[key_name(key), *(key_name(_value(value)) for value in values)] for key, values in differences(runs)]
    if len(runs) > 1:
        lead = "Keys that differ between the runs." if rows else "All runs have the same recipe."
    else:
        lead = "Keys that differ from the built-in defaults." if rows else "The built-in defaults."
    columns = ["Key", *(run.name for run in runs)]
    parts = [table(columns, rows, caption=lead.removesuffix(".")) if rows else paragraph(lead)]
    for run in runs:
        keys = [[key_name(key), key_name(_value(value))] for key, value in run.recipe.items()]
        recipe = table(["Key", "Value"], keys, caption=f"Recipe of {run.name}")
        parts.append(html.details(f"The whole recipe of {run.name}", recipe))
    return join(parts)


def _value(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return short_number(value)
    return "-" if value is None else str(value)


# -- results as measured


def measured_tables(rows: Sequence[Row], paper: "Published") -> Html:
    """A table for each data set: a row for each encoder, a column for each variant of a protocol."""
    if not rows:
        sources = "result JSONs (of train probe, fewshot, finetune, caption, eval), or their folder"
        return paragraph(f"No results: add --results with {sources}.")
    data_sets = dict.fromkeys(row.data for row in rows)
    blocks = [_measured_on(data, [row for row in rows if row.data == data], paper.benchmarks) for data in data_sets]
    units = "Accuracies and recalls in percent; ± is the standard deviation over seeds."
    return join([paragraph(units, muted=True), *blocks, html.details("All metrics", _all_metrics(rows))])


def _measured_on(data: str, rows: Sequence[Row], benchmarks: Sequence["Benchmark"]) -> Html:
    encoders = dict.fromkeys(row.encoder for row in rows)
    variants = dict.fromkeys(row.variant for row in rows if row.variant != row.encoder)
    cells = {(row.encoder, row.variant): row for row in rows}
    lines = []
    for encoder in encoders:
        of_encoder = [cells.get((encoder, variant)) or cells.get((encoder, encoder)) for variant in variants]
        lines.append([tag("code", encoder), *(_metric(row, row.main) if row else "-" for row in of_encoder)])
    names = [f"#{variant}{_unit(rows, variant)}" for variant in variants]
    measured_table = table(["Encoder", *names], lines, caption="Measured", label=f"Measured on {data}")
    published_tables = [
        table(["Published", "#Figure"], benchmark.rows, caption=f"Published: {benchmark.title}")
        for benchmark in benchmarks
        if any(is_of(row, benchmark.data, benchmark.protocol) for row in rows)
    ]
    return join([tag("h3", data), measured_table, *_compared_on(data, rows), *published_tables])


def _compared_on(data: str, rows: Sequence[Row]) -> list[Html]:
    """The differences to the first encoder, image by image; empty if no two rows can be compared."""
    lines = [
        [tag("code", row.encoder), row.variant, tag("code", versus.encoder), *versus.cells()]
        for row, versus in zip(rows, compare(row.tested for row in rows), strict=True)
        if versus
    ]
    if not lines:
        return []
    columns = ["Encoder", "Variant", "Less", *(f"#{name}" for name in HEADER)]
    note = "Percentage points. Interval and p are of a paired bootstrap over the test images, not over training seeds."
    label = f"Differences on {data}"
    return [table(columns, lines, caption="Difference to the first encoder", label=label), paragraph(note, muted=True)]


def _unit(rows: Sequence[Row], variant: str) -> str:
    """The main metric's name in parentheses; empty for top-1 accuracy."""
    main = next(row.main for row in rows if row.variant == variant)
    return "" if main == "top1" else f" ({main})"


def _all_metrics(rows: Sequence[Row]) -> Html:
    lines = []
    for row in rows:
        protocol = tag("span", row.protocol, class_="long")
        for name in row.metrics:
            value = _metric(row, name)
            lines.append([row.data, tag("code", row.encoder), row.variant, name, value, row.seeds or "-", protocol])
    columns = ["Data", "Encoder", "Variant", "Metric", "#Value", "#Seeds", "Protocol"]
    return table(columns, lines, caption="Every metric of every result")


def _metric(row: Row, name: str) -> str:
    return _with_spread(name, *row.metrics[name])


def _with_spread(name: str, mean: float | None, spread: float | None) -> str:
    return format_metric(name, mean) + (f" ± {format_metric(name, spread)}" if spread is not None else "")


# -- the paper's figures

_COLUMN_NAMES = {"probe": "linear probe", "zeroshot": "zero-shot after LiT"}


@dataclass(frozen=True)
class Benchmark:
    data: list[str]  # the kinds of data (`--data KIND:DIR`) whose tables show it
    protocol: str  # the variant, as results name it
    title: str
    rows: list[tuple[str, float]]  # encoder, percent (CIDEr: x 100)


@dataclass(frozen=True)
class Line:
    name: str
    published: list[float | None]  # by column
    where: dict[str, Any] = field(default_factory=dict)  # recipe keys of the runs of this line; empty: no run


@dataclass(frozen=True)
class Ablation:
    title: str
    setting: str
    columns: list[str]  # protocols
    rows: list[Line]


class Published(NamedTuple):
    source: str
    benchmarks: list[Benchmark]
    ablations: list[Ablation]


def published() -> Published:
    """Read published.json."""
    content = json.loads(resources.files("train.report").joinpath("published.json").read_text("utf8"))
    benchmarks = [Benchmark(**entry | {"rows": list(map(tuple, entry["rows"]))}) for entry in content["benchmarks"]]
    ablations = [Ablation(**entry | {"rows": [Line(**row) for row in entry["rows"]]}) for entry in content["ablations"]]
    return Published(content["source"], benchmarks, ablations)


def is_of(row: Row, data: Sequence[str], protocol: str) -> bool:
    """Whether a row is of one of these kinds of data (`imagenet:DIR`), and of that protocol or a variant of it."""
    return row.data.partition(":")[0] in data and is_variant(row, protocol)


def is_variant(row: Row, protocol: str) -> bool:
    """Whether a row is of a protocol or a variant of it: `probe, MAE's recipe`, or `NAME: probe` in a suite."""
    return row.variant.rpartition(": ")[2].partition(",")[0].partition(" (")[0] == protocol


def matches(run: Run, line: Line) -> bool:
    """Whether a run's recipe has all values of a line; a line that names no method means `train run`."""
    where = {"data.method": "superclass"} | line.where
    return bool(line.where) and all(run.recipe.get(key) == wanted for key, wanted in where.items())


class AblationResults(NamedTuple):
    columns: list[tuple[str, str]]  # data, variant
    cells: list[list[str]]  # by line, by column


def measured(ablation: Ablation, runs: Sequence[Run], rows: Sequence[Row]) -> AblationResults | None:
    """Own results for an ablation; None if fewer than two of its lines have a run, which would compare nothing.

    Several runs of a line (seeds) give mean ± standard deviation (n - 1).
    """
    runs_of_lines = [{run.path.resolve() for run in runs if matches(run, line)} for line in ablation.rows]
    own = [row for row in rows if any(is_variant(row, column) for column in ablation.columns)]
    matched = [row for row in own if any(row.run in paths for paths in runs_of_lines)]
    columns = list(dict.fromkeys((row.data, row.variant) for row in matched))
    cells = [
        [_cell([row for row in own if row.run in paths and (row.data, row.variant) == column]) for column in columns]
        for paths in runs_of_lines
    ]
    return AblationResults(columns, cells) if sum(any(cell != "-" for cell in line) for line in cells) > 1 else None


def _cell(rows: list[Row]) -> str:
    values = [value for row in rows if (value := row.metrics[row.main][0]) is not None]
    if not values:
        return "-"
    name = rows[0].main
    if len(values) == 1:
        return _with_spread(name, values[0], rows[0].metrics[name][1])
    return _with_spread(name, statistics.fmean(values), statistics.stdev(values)) + f", {len(values)} runs"


def paper_tables(runs: Sequence[Run], rows: Sequence[Row], paper: Published) -> Html:
    """The paper's ablations, with own results where runs differ in the same key."""
    text = (
        "As published, in percent. If two or more of the runs above differ in what a table compares, the table shows "
        "their results too. They are of another size and other data: compare the order, not the values."
    )
    tables = [_ablation(ablation, runs, rows) for ablation in paper.ablations]
    return join([paragraph(text), *tables, paragraph(paper.source, muted=True)])


def _ablation(ablation: Ablation, runs: Sequence[Run], rows: Sequence[Row]) -> Html:
    own = measured(ablation, runs, rows) or AblationResults([], [[] for _ in ablation.rows])
    columns = ["", *(f"#{_COLUMN_NAMES[column]}, published" for column in ablation.columns)]
    columns += [f"#{variant} on {data}, these runs" for data, variant in own.columns]
    lines = [
        [line.name, *map(_figure, line.published), *cells] for line, cells in zip(ablation.rows, own.cells, strict=True)
    ]
    label = f"{ablation.title}: {ablation.setting}"
    return join([tag("h3", ablation.title), table(columns, lines, caption=ablation.setting, label=label)])


def _figure(value: float | None) -> str:
    """With the decimals of the publication, at least one."""
    return "-" if value is None else max(f"{value:.1f}", f"{value:g}", key=len)
