"""The part of `train report` on visual weights: the newest RUN/visual/*.parquet -> two tables and a chart for each run.

Tokens in at least FREQUENT_SHARE of the captions are ranked by calibrated gain; the chart has gain against IDF.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from labels.idf import FREQUENT_SHARE, newest_visual, read_visual
from labels.show.html import Axis, Html, Mark, Section, Series, join, line_chart, paragraph, table, tag
from labels.tokenizers.tokenizer import name_of
from train.report.runs import Run

_SHOWN, _DOTS = 10, 1_500


def visual_sections(runs: Sequence[Run]) -> list[Section]:
    """The section, if a run has weighed its own labels (`train.weights: visual`); else none."""
    parts = [part for run in runs for part in _of_run(run, named=len(runs) > 1)]
    return [Section("visual", "Visual weights", join(parts))] if parts else []


def _of_run(run: Run, *, named: bool) -> list[Html]:
    path = newest_visual(run.path)
    if path is None:
        return []
    content, facts = read_visual(path)
    columns = {name: content[name].to_numpy() for name in ("document_frequency", "samples", "idf", "visual_gain")}
    names, tokenizer = content["token"], facts.get("tokenizer", "")
    frequency, gain = columns["document_frequency"], columns["visual_gain"]
    measured = np.flatnonzero(columns["samples"] > 0)
    frequent = measured[frequency[measured] >= FREQUENT_SHARE * run.recipe.get("data.captions", 0)]
    ranked = frequent[np.argsort(-gain[frequent], kind="stable")]
    shown = min(_SHOWN, len(ranked) // 2)
    if not shown:
        return [paragraph(f"{path}: no frequent token is measured.")]

    def name(token: int) -> str:
        return name_of(names[int(token)].as_py(), tokenizer)

    def row(token: int) -> list[Any]:
        idf, visual = columns["idf"][token], gain[token]
        return [name(token), f"{frequency[token]:,}", f"{idf:.3f}", f"{visual:.3f}", f"{idf * visual:.3f}"]

    head = ["Token", "#Captions", "#IDF", "#Gain (nats)", "#IDF x gain"]
    lead = (
        f"Measured on held-out samples after {facts.get('samples_seen', 0):,} samples; {len(ranked):,} frequent tokens."
    )
    # the most frequent first: rare tokens are nearly all at the mean of their frequency
    dots = measured[np.argsort(-frequency[measured], kind="stable")][:_DOTS]
    marks = [Mark(float(columns["idf"][token]), float(gain[token]), name(token)) for token in ranked[:shown]]
    series = Series(columns["idf"][dots].tolist(), gain[dots].tolist(), "dots")
    axes = Axis("IDF (nats)"), Axis("visual gain (nats)", low=0.0, high=1.1 * float(gain[ranked[0]]) or 1.0)
    suffix = f": {run.name}" if named else ""
    return [
        *([tag("h3", run.name)] if named else []),
        paragraph(lead, muted=True),
        table(head, map(row, ranked[:shown]), caption="Most visible of the frequent tokens"),
        table(head, map(row, ranked[: -shown - 1 : -1]), caption="Least visible of the frequent tokens"),
        line_chart(f"Visual gain against IDF{suffix}", *axes, [series], marks, note=f"{len(dots):,} tokens."),
    ]
