"""The page of `train report`: curves, recipes, results next to the paper's figures."""

from collections.abc import Sequence

from labels.html import (
    Axis,
    Html,
    Section,
    details,
    format_seconds,
    join,
    key_name,
    line_chart,
    page,
    paragraph,
    short_number,
    table,
    tiles,
)
from train.evals.results import Row
from train.report.results import measured_tables, paper_tables, published
from train.report.runs import Run, differences, loss_curves, throughput_curves


def report_page(runs: Sequence[Run], results: Sequence[Row]) -> str:
    """The whole HTML file; `results` may hold encoders other than `runs`."""
    paper = published()
    sections = [
        Section("loss", "Loss", _loss(runs)),
        Section("speed", "Throughput", _speed(runs)),
        Section("recipe", "Recipe", _recipe(runs)),
        Section("results", "Results", measured_tables(results, paper)),
        Section("paper", "The paper's tables", paper_tables(runs, results, paper)),
    ]
    if len(runs) == 1:
        return page(f"Run {runs[0].name}", _tiles(runs[0]), sections)
    return page(f"{len(runs)} runs", paragraph(", ".join(run.name for run in runs)), [_overview(runs), *sections])


def _tiles(run: Run) -> Html:
    rate, wait, mfu = (run.weighed(key) for key in ("samples_per_s", "data_wait", "mfu"))
    loss, skipped, bad = run.last_loss(), run.skipped, run.bad_images
    return tiles(
        [
            ("Samples seen", f"{run.samples:,}", f"{run.samples / run.budget:.0%} of the budget"),
            ("Loss", _or_dash(loss, "{:.3f}"), "nats, mean of the last 1% of steps"),
            ("Throughput", _or_dash(rate, "{:,.0f}"), f"samples/s; {format_seconds(run.seconds())} in the loop"),
            ("Data wait", _or_dash(wait, "{:.1%}"), "of the time"),
            ("MFU", _or_dash(mfu, "{:.1%}"), "" if mfu is not None else "unknown: the device's peak is not known"),
            ("Faults", f"{skipped + bad:,}", f"{skipped:,} steps skipped, {bad:,} bad images"),
        ]
    )


def _overview(runs: Sequence[Run]) -> Section:
    rows = []
    for run in runs:
        rate, wait, mfu = (run.weighed(key) for key in ("samples_per_s", "data_wait", "mfu"))
        seen = f"{short_number(run.samples)} ({run.samples / run.budget:.0%})"
        numbers = [
            _or_dash(run.last_loss(), "{:.3f}"),
            format_seconds(run.seconds()),
            _or_dash(rate, "{:,.0f}"),
            _or_dash(wait, "{:.1%}"),
        ]
        rows.append([run.name, seen, *numbers, _or_dash(mfu, "{:.1%}"), f"{run.skipped:,}", f"{run.bad_images:,}"])
    columns = [
        "Run",
        "#Samples seen",
        "#Loss (nats)",
        "#Time",
        "#Samples/s",
        "#Data wait",
        "#MFU",
        "#Skipped steps",
        "#Bad images",
    ]
    note = "Loss: mean of the last 1% of steps. Losses of different kinds or of different labels cannot be compared."
    return Section("runs", "Runs", join([table(columns, rows, caption="All runs"), paragraph(note, muted=True)]))


def _loss(runs: Sequence[Run]) -> Html:
    """A chart for each kind of loss, since values of different losses cannot be compared."""
    note = "The mean of neighbouring steps" + (", and each step (faint)" if len(runs) == 1 else "")
    kinds = dict.fromkeys(run.recipe["train.loss.name"] for run in runs)
    charts = []
    for kind in kinds:
        curves = loss_curves(runs, [run for run in runs if run.recipe["train.loss.name"] == kind])
        if curves:
            title = "Loss over samples seen" + (f": {kind}" if len(kinds) > 1 else "")
            charts.append(line_chart(title, Axis("samples seen", low=0.0), Axis("loss (nats)"), curves, note=note))
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
            charts.append(
                line_chart(title, Axis("samples seen", low=0.0), Axis(label, low=0.0, high=top * 1.05 or 1.0), curves)
            )
    if not charts:
        return paragraph("No throughput is logged yet.")
    if all(run.weighed("mfu") is None for run in runs):
        charts.append(paragraph("No MFU: the device's peak is not known; set train.runtime.peak_tflops.", muted=True))
    return join(charts)


def _recipe(runs: Sequence[Run]) -> Html:
    rows = [[key_name(key), *(key_name(_value(value)) for value in values)] for key, values in differences(runs)]
    if len(runs) > 1:
        lead = "Keys that differ between the runs." if rows else "All runs have the same recipe."
    else:
        lead = "Keys that differ from the built-in defaults." if rows else "The built-in defaults."
    shown = (
        table(["Key", *(run.name for run in runs)], rows, caption=lead.removesuffix(".")) if rows else paragraph(lead)
    )
    whole = [
        details(
            f"The whole recipe of {run.name}",
            table(
                ["Key", "Value"],
                [[key_name(key), key_name(_value(value))] for key, value in run.recipe.items()],
                caption=f"Recipe of {run.name}",
            ),
        )
        for run in runs
    ]
    return join([shown, *whole])


def _value(value: object) -> str:
    if value is None:
        return "-"
    return (
        short_number(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000
        else str(value)
    )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
