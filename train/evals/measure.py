"""One protocol, one encoder, one data set -> rows for tables and result JSONs, and the splits that were drawn, for the
disk.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from labels.settings import Pipeline
from labels.storage import UserError, write_json, write_whole
from train.encoders.encoder import Encoder, EncoderSpec
from train.encoders.load import load_encoder
from train.evals.data.captions import CaptionSet
from train.evals.data.images import LabelledImages
from train.evals.data.sets import DataSet, load_data, load_pair
from train.evals.features import TRANSFORM, Extractor
from train.evals.kinds.probe import majority
from train.evals.protocol import Evaluation, Score, format_metric, is_share

MAJORITY = "majority class"
_VERSIONS = ("torch", "timm", "numpy", "pillow", "transformers", "open_clip_torch")
SPLITS = pa.schema(
    [
        ("encoder", pa.string()),
        ("variant", pa.string()),
        ("seed", pa.int64()),
        ("key", pa.string()),
        ("class", pa.string()),
    ]
)
"""One row a training sample that was drawn: shots of a fewshot, or the validation part of a probe; in the order of
drawing.
"""


class Measured(NamedTuple):
    """`rows`: one a variant, JSON values. `splits`: a table of SPLITS, without rows where nothing was drawn."""

    rows: list[dict[str, Any]]
    splits: pa.Table


def measure(
    evaluation: Evaluation, encoder: Encoder, data: DataSet | CaptionSet, pipeline: Pipeline, extract: Extractor
) -> Measured:
    """All seeds of one encoder. A seeded one is drawn again for each, so that its spread includes the initialisation.

    Each row: encoder, variant, description; `metrics`, the names of what was measured, the main one first; each of them
        as the mean over
    seeds, with `_std` (n - 1) and `_standard_error` (what the size of the test part alone leaves); and `seeds`: every
    seed's metrics, details, weights and the fingerprint of its split.
    """
    settings: Any = evaluation.settings(pipeline)
    train = data.train if isinstance(data, DataSet) else None
    began = time.monotonic()
    scores: list[tuple[Score, str]] = []
    for group in [[seed] for seed in settings.seeds] if encoder.seeded else [list(settings.seeds)]:
        drawn = load_encoder(encoder.requested, seed=group[0]) if encoder.seeded else encoder
        weights = drawn.describe()["weights"]
        scores += [(score, weights) for score in evaluation.scores(drawn, data, settings, extract, group)]
    seconds = round(time.monotonic() - began, 2)
    rows = []
    for variant in dict.fromkeys(score.variant for score, _ in scores):
        seeds = [_seed_row(score, weights, train) for score, weights in scores if score.variant == variant]
        first = next(score for score, _ in scores if score.variant == variant)
        names, trials = first.metrics, first.trials or len(data.test)
        metrics: dict[str, Any] = {}
        for name in names:
            metrics |= _summary(name, [one[name] for one in seeds], trials, first.standard_error)
        varies = "initialisation and what is drawn" if encoder.seeded else "what is drawn"
        about = {"encoder": encoder.name, "variant": variant, "description": encoder.describe(), "seed_varies": varies}
        rows.append({**about, "metrics": list(names), **metrics, "seeds": seeds, "seconds": seconds})
    return Measured(rows, _split_table(encoder.name, train, [score for score, _ in scores]))


def floor_rows(data: DataSet | CaptionSet) -> list[dict[str, Any]]:
    """The row of a table that no encoder is needed for: the majority class; none for captions."""
    return [majority_row(data)] if isinstance(data, DataSet) else []


def majority_row(data: DataSet) -> dict[str, Any]:
    """What always guessing the training part's most frequent classes scores: the floor of every table."""
    found = majority(data.train.targets, data.test.targets, classes=len(data.classes))
    row: dict[str, Any] = {"encoder": MAJORITY, "variant": MAJORITY, "metrics": list(found)}
    for name, value in found.items():
        row |= _summary(name, [value], len(data.test))
    return row


def result(
    evaluation: Evaluation,
    data: DataSet | CaptionSet,
    pipeline: Pipeline,
    extract: Extractor,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The whole JSON of a protocol on a data set."""
    settings = evaluation.settings(pipeline)
    return {
        "protocol": evaluation.describe(settings),
        "transform": TRANSFORM,
        "settings": settings.model_dump(),
        "precision": extract.precision,
        **data.describe(),
        "device": str(extract.device),
        "versions": {"python": sys.version.split()[0], **_versions()},
        "results": rows,
    }


def write_splits(path: Path, tables: Sequence[pa.Table]) -> None:
    """Put what was drawn beside its result: a table of SPLITS."""
    write_whole(path, lambda partial: pq.write_table(pa.concat_tables(tables), partial, compression="zstd"))


def on_device(settings: Any, cache: Path | None) -> Extractor:
    """An extractor on the GPU, if there is one."""
    return Extractor(torch.device("cuda" if torch.cuda.is_available() else "cpu"), settings, cache)


def _versions() -> dict[str, str]:
    """Of what decides figures, where it is installed."""
    found = {}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _seed_row(score: Score, weights: str, train: LabelledImages | None) -> dict[str, Any]:
    row = {"seed": score.seed, **score.metrics, **score.detail, "encoder_weights": weights}
    if score.split is not None and train is not None:
        keys = "\n".join(train.keys[position] for position in score.split)
        row |= {"split": len(score.split), "split_fingerprint": hashlib.sha256(keys.encode()).hexdigest()[:16]}
    return row


def _summary(name: str, values: list[float | None], trials: int, error: float | None = None) -> dict[str, Any]:
    """`error`: of one value by the test part's size; None: that of a share of `trials`."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return {name: None, f"{name}_std": None, f"{name}_standard_error": None}
    mean = float(known.mean())
    spread = float(known.std(ddof=1)) if len(known) > 1 else None
    error = float(np.sqrt(max(mean * (1 - mean), 0.0) / trials)) if error is None else error
    return {name: mean, f"{name}_std": spread, f"{name}_standard_error": error}


def _split_table(encoder: str, train: LabelledImages | None, scores: list[Score]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in SPLITS.names}
    for score in scores:
        if train is None or score.split is None:
            continue
        for position in score.split:
            row = (encoder, score.variant, score.seed, train.keys[position], train.classes[train.targets[position]])
            for name, value in zip(SPLITS.names, row, strict=True):
                columns[name].append(value)
    return pa.table(columns, schema=SPLITS)


# ---- tables: Rows of results as tables on the terminal, and as Markdown.


_WIDEST = 1000


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """One protocol on one data set: a line for each encoder and variant; the main metric with its spreads, then the
    others.
    """
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
        """`rows` have `data`, `encoder`, `variant`, and the first of their `metrics` with its `_std`; a cell without a
        row is `-`.
        """
        self._cells = {(row["data"], row["encoder"], row["variant"]): row for row in rows}
        self._lines = list(dict.fromkeys((row["data"], row["encoder"]) for row in rows))
        self._variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != MAJORITY]

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        return ["data", "encoder", *self._variants]

    def lines(self) -> list[list[str]]:
        """Text of every cell, line by line."""
        return [
            [data, encoder, *(self._cell(data, encoder, variant) for variant in self._variants)]
            for data, encoder in self._lines
        ]

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


# ---- run_protocol: `train probe | fewshot | knn | ... | caption`: one protocol for some encoders on one data set, as a
# table and a result JSON.


def named_data(data: str | None, train_dir: Path | None, test_dir: Path | None, cache: Path | None) -> DataSet:
    """The data set of `--data`, or of `--train` with `--test`.

    Raises:
        UserError: neither or both are given, and all of load_data and load_pair.
    """
    if data is not None and train_dir is None and test_dir is None:
        return load_data(data, cache)
    if data is None and train_dir is not None and test_dir is not None:
        return load_pair(train_dir, test_dir, cache)
    raise UserError("the data is not named", allowed="--data KIND:DIR, or --train DIR with --test DIR")


def images_told(data: DataSet | CaptionSet) -> str:
    """How many images of which parts."""
    return f"{len(data.train)} + {len(data.test)} images" if isinstance(data, DataSet) else f"{len(data.test)} images"


def run_protocol(
    evaluation: Evaluation,
    encoders: Sequence[EncoderSpec],
    load: Callable[[], DataSet | CaptionSet],
    pipeline: Pipeline,
    extract: Extractor,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure every encoder, print one row for each and, of classes, one for the majority class, write the result and
    what was drawn.

    Args:
        load: gives the data set; called when the encoders are known to be sound.
        out: the result JSON; splits lie beside it, as <name>.splits.parquet.

    Returns:
        What the JSON holds: accuracies as fractions of 1, seconds of wall clock.

    Raises:
        UserError: whatever does not fit, before anything expensive begins.
    """
    if out is not None and out.is_dir():
        raise UserError(
            f"--out {out} is a directory",
            allowed="the path of a file",
            fix=f"--out {out / (evaluation.name + '.json')}",
        )
    settings = evaluation.settings(pipeline)
    loaded = [
        load_encoder(requested) for requested in encoders
    ]  # all of them: a mistake in the last one must not cost the others' time
    for encoder in loaded:
        if reason := evaluation.unfit(encoder):
            raise UserError(f"{evaluation.name}: the encoder {encoder.name!r} cannot be measured so: {reason}")
    data = load()
    evaluation.check(data, settings)
    rows, splits = floor_rows(data), []
    for encoder in loaded:
        print(f"{evaluation.name}: {encoder.name}: {images_told(data)}, width {encoder.width}", flush=True)
        measured = measure(evaluation, encoder, data, pipeline, extract)
        rows += measured.rows
        splits.append(measured.splits)
    found = result(evaluation, data, pipeline, extract, rows)
    print_rows(f"{data.name}: {found['protocol']}", rows)
    if out:
        if sum(map(len, splits)):
            write_splits(out.with_suffix(".splits.parquet"), splits)
        write_json(out, found)
    return found
