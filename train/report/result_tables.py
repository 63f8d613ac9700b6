"""The report's tables of results: one for each data set with the published figures beside it, then the paper's own tables."""

from collections.abc import Sequence

from labels.html import Html, details, join, paragraph, table, tag
from train.report.published import Ablation, Benchmark, Published, is_of, measured
from train.report.results import Row, told
from train.report.runs import Run

_COLUMN_NAMES = {"probe": "linear probe", "zeroshot": "zero-shot after LiT"}


def measured_tables(rows: Sequence[Row], paper: Published) -> Html:
    """For each data set: encoders down, variants of protocols across."""
    if not rows:
        return paragraph(
            "No results were given: add --results with result JSONs (of train probe, fewshot, finetune, caption, eval), or their folder."
        )
    blocks = [_block(data, [row for row in rows if row.data == data], paper.benchmarks) for data in dict.fromkeys(row.data for row in rows)]
    units = "Accuracies and recalls in percent; ± is the deviation over seeds."
    return join([paragraph(units, muted=True), *blocks, details("All metrics", _all_metrics(rows))])


def paper_tables(runs: Sequence[Run], rows: Sequence[Row], paper: Published) -> Html:
    """The paper's ablations, and beside them what runs here came to that differ in the same thing."""
    text = (
        "As published, in percent. Where two or more of the runs above differ in what a table compares, their own results stand beside it: "
        "at another size and on other data, so that the order can be compared, not the height."
    )
    return join([paragraph(text), *(_ablation(one, runs, rows) for one in paper.ablations), paragraph(paper.source, muted=True)])


def _block(data: str, rows: Sequence[Row], benchmarks: Sequence[Benchmark]) -> Html:
    encoders, variants = (
        dict.fromkeys(row.encoder for row in rows),
        dict.fromkeys(row.variant for row in rows if row.variant != row.encoder),
    )
    cells = {(row.encoder, row.variant): row for row in rows}
    lines = []
    for encoder in encoders:
        found = [cells.get((encoder, variant)) or cells.get((encoder, encoder)) for variant in variants]
        lines.append([tag("code", encoder), *(_value(row, row.main) if row else "-" for row in found)])
    names = [f"#{variant}" + (f" ({metric})" if (metric := _metric(rows, variant)) else "") for variant in variants]
    beside = [one for one in benchmarks if any(is_of(row, one.data, one.protocol) for row in rows)]
    published = [table(["Published", "#Figure"], one.rows, caption=f"Published: {one.title}") for one in beside]
    return join([tag("h3", data), table(["Encoder", *names], lines, caption="Measured", label=f"Measured on {data}"), *published])


def _metric(rows: Sequence[Row], variant: str) -> str:
    """The main metric's name, where it is not top-1 accuracy, which needs no name."""
    return next(("" if row.main == "top1" else row.main for row in rows if row.variant == variant), "")


def _value(row: Row, name: str) -> str:
    mean, spread = row.metrics[name]
    return told(name, mean) + (f" ± {told(name, spread)}" if spread is not None else "")


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
    return table(["Data", "Encoder", "Variant", "Metric", "#Value", "#Seeds", "Protocol"], lines, caption="Every metric of every result")


def _published(value: float | None) -> str:
    """With as many decimals as it was published with, one at least."""
    return "-" if value is None else max(f"{value:.1f}", f"{value:g}", key=len)


def _ablation(ablation: Ablation, runs: Sequence[Run], rows: Sequence[Row]) -> Html:
    here = measured(ablation, runs, rows)
    columns = ["", *(f"#{_COLUMN_NAMES[column]}, published" for column in ablation.columns)]
    columns += [f"#{variant} on {data}, here" for data, variant in here.columns] if here else []
    lines = []
    for place, line in enumerate(ablation.rows):
        numbers = [_published(value) for value in line.published]
        lines.append([line.name, *numbers, *(here.cells[place] if here else [])])
    return join([tag("h3", ablation.title), table(columns, lines, caption=ablation.setting, label=f"{ablation.title}: {ablation.setting}")])
