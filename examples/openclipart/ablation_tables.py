"""Results of all finished units -> WORK/results.json, tables.md and plots.

Every accuracy is a mean over seeds with the standard deviation (n - 1); a difference is paired by seed, with its
standard error.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation_grid import Grid, Planner, Table, Unit
from ablation_units import finished
from labels.storage import write_json, write_whole

METRICS = {"probe": "linear probe", "fewshot": "10-shot", "zeroshot": "zero-shot"}
Values = dict[str, dict[str, dict[int, float]]]
"""Cell -> metric -> seed -> accuracy, a fraction of 1."""


def gather(units: Sequence[Unit]) -> Values:
    """Accuracies of the finished units."""
    values: Values = {}
    for unit in units:
        result = finished(unit)
        for metric, value in (result["metrics"] if result else {}).items():
            values.setdefault(unit.cell, {}).setdefault(metric, {})[unit.seed] = value
    return values


def write_tables(grid: Grid, planner: Planner, units: Sequence[Unit]) -> None:
    """Write results.json and tables.md for the finished units."""
    values = gather(units)
    text = "\n\n".join(table_lines(table, values) for table in grid.tables)
    majority = next((value for metrics in values.values() for value in metrics.get("majority", {}).values()), math.nan)
    done = sum(len(metrics["probe"]) for metrics in values.values())
    head = "Top-1, percent, on held-out drawings; mean and standard deviation over seeds. "
    head += f"Majority class: {majority:.1%}. "
    text = f"{head}Finished: {done} of {len(units)} trainings.\n\n{text}\n"
    write_whole(planner.work / "tables.md", lambda partial: partial.write_text(text, encoding="utf8"))
    cells = {name: {metric: _seeds(seeds) for metric, seeds in found.items()} for name, found in values.items()}
    write_json(planner.work / "results.json", {"finished": done, "trainings": len(units), "cells": cells})


def _seeds(values: dict[int, float]) -> dict[str, Any]:
    mean, std = _summary(list(values.values()))
    return {"seeds": values, "mean": mean, "std": std}


def table_lines(table: Table, values: Values) -> str:
    """A table in Markdown, with dashes for unfinished cells."""
    columns = [metric for metric in METRICS if any(metric in values.get(row.cell, {}) for row in table.rows)] or [
        "probe"
    ]
    published = [metric for metric in METRICS if any(metric in row.published for row in table.rows)]
    heads = [
        *(METRICS[metric] for metric in columns),
        "probe, difference to the first row",
        "seeds",
        *(f"paper: {METRICS[metric]}" for metric in published),
    ]
    lines = [
        f"**{table.title}** ({table.setting}). Paper: {table.published}.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    first = values.get(table.rows[0].cell, {}).get("probe", {})
    for row in table.rows:
        found = values.get(row.cell, {})
        probe = found.get("probe", {})
        columns_of_row = [_percent(list(found.get(metric, {}).values())) for metric in columns]
        columns_of_row += ["" if row is table.rows[0] else difference(first, probe), str(len(probe))]
        columns_of_row += [f"{row.published[metric]:.1f}" if metric in row.published else "" for metric in published]
        lines.append(f"| {row.name} | {' | '.join(columns_of_row)} |")
    return "\n".join(lines)


def difference(first: dict[int, float], other: dict[int, float]) -> str:
    """Points by which `other` is above `first` with the same seeds: the mean and its standard error."""
    both = [other[seed] - first[seed] for seed in first if seed in other]
    mean, std = _summary(both)
    if mean is None:
        return "-"
    return f"{100 * mean:+.1f}" + (f" ± {100 * std / math.sqrt(len(both)):.1f}" if std is not None else "")


def _summary(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation, or None for too few values."""
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def _percent(values: Sequence[float]) -> str:
    mean, std = _summary(values)
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def draw_plots(grid: Grid, planner: Planner, units: Sequence[Unit]) -> list[Path]:
    """Draw every plot that has finished cells: mean over seeds, bars of one standard deviation."""
    import matplotlib as mpl  # takes half a second to import, and is an extra of pyproject.toml

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    values, drawn = gather(units), []
    for plot in grid.plots:
        figure, axes = plt.subplots(figsize=(6, 4), dpi=130)
        ticks: set[float] = set()
        for name, cells in plot.lines.items():
            points = [
                (_value(planner, cell, plot.key), *_summary(list(values[cell]["probe"].values())))
                for cell in cells
                if cell in values
            ]
            if points:
                x, mean, std = zip(*points, strict=True)
                ticks |= set(x)
                axes.errorbar(
                    x,
                    [100 * value for value in mean],
                    [100 * (value or 0) for value in std],
                    marker="o",
                    capsize=3,
                    label=name,
                )
        if not ticks:
            plt.close(figure)
            continue
        axes.set_xscale("log")
        axes.set_xticks(sorted(ticks), [f"{tick:,.0f}" for tick in sorted(ticks)])
        axes.minorticks_off()
        axes.set(xlabel=plot.label, ylabel="linear probe, top-1 %")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        figure.tight_layout()
        path = planner.work / plot.file
        write_whole(path, lambda partial, figure=figure: figure.savefig(partial, format="png"))
        plt.close(figure)
        drawn.append(path)
    return drawn


def _value(planner: Planner, cell: str, key: str) -> float:
    """A dotted key of a cell's configuration."""
    at: Any = planner.settings(cell).model_dump()
    for name in key.split("."):
        at = at[name]
    return float(at)
