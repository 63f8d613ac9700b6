"""One protocol, some encoders, one data set -> rows of metrics, a table, a result JSON and the splits that were drawn.

    run_protocol -> measure (for each encoder): Evaluation.scores for all seeds -> rows, splits -> print_rows, JSON
    result JSONs -> read_results -> Row, for the report's tables and an export's card

suite.py calls `measure` for many protocols and data sets, and ends with a `Grid`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from labels.show.terminal import visible
from labels.storage import UserError, fingerprint, printable, write_json, write_whole
from train.encoders.encoder import Encoder, EncoderSpec
from train.encoders.load import load_encoder
from train.evals.data.captions import CaptionSet
from train.evals.data.images import LabelledImages
from train.evals.data.sets import DataSet, load_data, load_pair
from train.evals.features import TRANSFORM, Extractor
from train.evals.kinds.probe import majority
from train.evals.paired import HEADER, PerImage, add_versus, pack, tested_of, versus_of
from train.evals.protocol import Evaluation, Score, format_metric, is_share, markdown_line

MAJORITY = "majority class"
_LIBRARIES = ("torch", "timm", "numpy", "pillow", "transformers", "open_clip_torch")
# One row for each training sample that was drawn (shots, or the validation part of a probe), in the order of drawing.
_TEXT = pa.string()
SPLITS = pa.schema({"encoder": _TEXT, "variant": _TEXT, "seed": pa.int64(), "key": _TEXT, "class": _TEXT})


def named_data(
    data: str | None, train_dir: Path | None, test_dir: Path | None, cache: Path | None, class_key: str | None = None
) -> DataSet:
    """The data set of `--data`, or of `--train` with `--test`; in shards the class is `class_key` of the json."""
    if data is not None and train_dir is None and test_dir is None:
        return load_data(data, cache, class_key)
    if data is None and train_dir is not None and test_dir is not None:
        return load_pair(train_dir, test_dir, cache, class_key)
    raise UserError("the data is not named", allowed="--data KIND:DIR, or --train DIR with --test DIR")


def on_device(settings: Any, cache: Path | None) -> Extractor:
    """An extractor on the GPU, if there is one."""
    return Extractor(torch.device("cuda" if torch.cuda.is_available() else "cpu"), settings, cache)


def run_protocol(
    evaluation: Evaluation,
    encoders: Sequence[EncoderSpec],
    load: Callable[[], DataSet | CaptionSet],
    pipeline: Pipeline,
    extract: Extractor,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate every encoder; print a row for each and, with classes, one for the majority class; write the result JSON
    `out`, and what was drawn next to it, as <name>.splits.parquet. Returns the content of the JSON.

    `load` gives the data set; it is called when the encoders are known to be sound. All is checked before anything
    expensive.
    """
    if out is not None and out.is_dir():
        fix = f"--out {out / (evaluation.name + '.json')}"
        raise UserError(f"--out {out} is a directory", allowed="the path of a file", fix=fix)
    settings = evaluation.settings(pipeline)
    loaded = [load_encoder(spec) for spec in encoders]
    for encoder in loaded:
        if reason := evaluation.unfit(encoder):
            problem = f"{evaluation.name} cannot evaluate the encoder {encoder.name!r}: {reason}"
            raise UserError(problem, fix="name another --encoder")
    data = load()
    evaluation.check(data, settings)
    images = f"{len(data.train)} + {len(data.test)}" if isinstance(data, DataSet) else f"{len(data.test)}"
    rows, splits = floor_rows(data), []
    for encoder in loaded:
        print(f"{evaluation.name}: {encoder.name}: {images} images, width {encoder.width}", flush=True)
        measured = measure(evaluation, encoder, data, pipeline, extract)
        rows += measured.rows
        splits.append(measured.splits)
    add_versus(rows)
    content = result(evaluation, data, pipeline, extract, rows)
    print_rows(f"{data.name}: {content['protocol']}", rows)
    if out:
        if sum(map(len, splits)):
            write_splits(out.with_suffix(".splits.parquet"), splits)
        write_json(out, content)
    return content


class Measured(NamedTuple):
    """The rows of one encoder, one for each variant, JSON values; and a SPLITS table, empty where nothing was drawn."""

    rows: list[dict[str, Any]]
    splits: pa.Table


def measure(
    evaluation: Evaluation, encoder: Encoder, data: DataSet | CaptionSet, pipeline: Pipeline, extract: Extractor
) -> Measured:
    """All seeds of one encoder. A seeded one is drawn again for each, so that its spread includes the initialisation.

    Each row: encoder, variant, description; `metrics`, their names, the main one first; each as the mean over seeds,
    with `_std` (n - 1) and `_standard_error` (from the size of the test part); and `seeds`: every seed's metrics,
    details, weights, the fingerprint of its split, and for each image whether its first guess is right (`correct`, as
    paired.py packs it, of the images `tested`).
    """
    settings: Any = evaluation.settings(pipeline)
    train = data.train if isinstance(data, DataSet) else None
    start = time.monotonic()
    scores: list[tuple[Score, str]] = []
    for group in [[seed] for seed in settings.seeds] if encoder.seeded else [list(settings.seeds)]:
        drawn = load_encoder(encoder.requested, seed=group[0]) if encoder.seeded else encoder
        weights = drawn.describe()["weights"]
        scores += [(score, weights) for score in evaluation.scores(drawn, data, settings, extract, group)]
    seconds = round(time.monotonic() - start, 2)
    rows = []
    for variant in dict.fromkeys(score.variant for score, _ in scores):
        first = next(score for score, _ in scores if score.variant == variant)
        seeds = [_seed_row(score, weights, train) for score, weights in scores if score.variant == variant]
        names, trials = first.metrics, first.trials or len(data.test)
        metrics: dict[str, Any] = {}
        for name in names:
            metrics |= _summary(name, [seed_row[name] for seed_row in seeds], trials, first.standard_error)
        varies = "initialisation and what is drawn" if encoder.seeded else "what is drawn"
        about = {"encoder": encoder.name, "variant": variant, "description": encoder.describe(), "seed_varies": varies}
        tested = {} if first.correct is None else {"tested": _tested(data, len(first.correct))}
        rows.append({**about, "metrics": list(names), **metrics, **tested, "seeds": seeds, "seconds": seconds})
    return Measured(rows, _split_table(printable(encoder.name), train, [score for score, _ in scores]))


def _tested(data: DataSet | CaptionSet, count: int) -> dict[str, Any]:
    """Number and fingerprint of the images that were tested, in order: the test part, or both parts (folds)."""
    parts = [data.test] if count == len(data.test) else [part for part in (data.train, data.test) if part]
    return {"count": count, "fingerprint": fingerprint([[part.fingerprint, part.image_fingerprint] for part in parts])}


def floor_rows(data: DataSet | CaptionSet) -> list[dict[str, Any]]:
    """The score of always guessing the training part's most frequent classes: the floor of every table; none for
    captions.
    """
    if not isinstance(data, DataSet):
        return []
    metrics = majority(data.train.targets, data.test.targets, classes=len(data.classes))
    row: dict[str, Any] = {"encoder": MAJORITY, "variant": MAJORITY, "metrics": list(metrics)}
    for name, value in metrics.items():
        row |= _summary(name, [value], len(data.test))
    return [row]


def result(
    evaluation: Evaluation,
    data: DataSet | CaptionSet,
    pipeline: Pipeline,
    extract: Extractor,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The whole JSON of a protocol on a data set."""
    settings = evaluation.settings(pipeline)
    versions = {"python": sys.version.split()[0]}
    for library in _LIBRARIES:  # those that influence metrics
        with suppress(PackageNotFoundError):
            versions[library] = version(library)
    return {
        "protocol": evaluation.describe(settings),
        "transform": TRANSFORM,
        "settings": settings.model_dump(),
        "precision": extract.precision,
        **data.describe(),
        "device": str(extract.device),
        "versions": versions,
        "results": rows,
    }


def write_splits(path: Path, tables: Sequence[pa.Table]) -> None:
    """Write what was drawn, tables of SPLITS."""
    write_whole(path, lambda partial: pq.write_table(pa.concat_tables(tables), partial, compression="zstd"))


def _seed_row(score: Score, weights: str, train: LabelledImages | None) -> dict[str, Any]:
    row = {"seed": score.seed, **score.metrics, **score.detail, "encoder_weights": weights}
    if score.correct is not None:
        row["correct"] = pack(score.correct)
    if score.split is not None and train is not None:
        keys = "\n".join(train.keys[position] for position in score.split)
        row |= {"split": len(score.split), "split_fingerprint": hashlib.sha256(keys.encode()).hexdigest()[:16]}
    return row


def _summary(name: str, values: list[float | None], trials: int, error: float | None = None) -> dict[str, Any]:
    """Mean and spreads. `error`: of one value by the test part's size; None: that of a share of `trials`."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return {name: None, f"{name}_std": None, f"{name}_standard_error": None}
    mean = float(known.mean())
    spread = float(known.std(ddof=1)) if len(known) > 1 else None
    error = float(np.sqrt(max(mean * (1 - mean), 0.0) / trials)) if error is None else error
    return {name: mean, f"{name}_std": spread, f"{name}_standard_error": error}


def _split_table(encoder: str, train: LabelledImages | None, scores: list[Score]) -> pa.Table:
    rows = [
        (encoder, score.variant, score.seed, train.keys[position], train.classes[train.targets[position]])
        for score in scores
        if train is not None and score.split is not None
        for position in score.split
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(SPLITS)
    return pa.table(dict(zip(SPLITS.names, columns, strict=True)), schema=SPLITS)


# -- tables on the terminal and in Markdown

_WIDEST = 1000
_COMPARED = "difference to the first encoder in percentage points, by a paired bootstrap over the test images"
DIFFERENCES = ["data", "encoder", "variant", *HEADER]


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """One protocol on one data set: a line for each encoder and variant, with the main metric's spreads, and its
    difference to the first encoder (paired.py).
    """
    several = len({row["variant"] for row in rows} - {MAJORITY}) > 1
    main, *others = rows[-1]["metrics"]
    words = ["encoder", *(["variant"] if several else [])]
    main_column, *other_columns = (f"{name} %" if is_share(name) else name for name in (main, *others))
    compared = [f"{HEADER[0]} to first", *HEADER[1:]] if any("versus" in row for row in rows) else []
    table = _table(title, [*words, main_column, "± seeds", "± test size", *compared, *other_columns, "seconds"], words)
    for row in rows:
        values = [format_metric(key, row.get(key)) for key in (main, f"{main}_std", f"{main}_standard_error")]
        versus = versus_of(row)
        values += versus.cells() if versus else ["-"] * len(compared)
        values += [format_metric(key, row.get(key)) for key in others]
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        table.add_row(*(visible(row[word]) for word in words), *values, seconds)
    _print_table(table)


class Grid:
    """The final table of a suite: encoders down, variants across, one block for each data set."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        """`rows` have `data`, `encoder`, `variant`, and the first of their `metrics` with its `_std`."""
        self._cells = {(row["data"], row["encoder"], row["variant"]): row for row in rows}
        self._lines = list(dict.fromkeys((row["data"], row["encoder"]) for row in rows))
        self._variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != MAJORITY]
        self.header = ["data", "encoder", *self._variants]

    def lines(self) -> list[list[str]]:
        """The text of every cell, line by line."""
        return [[*line, *(self._cell(*line, variant) for variant in self._variants)] for line in self._lines]

    def _cell(self, data: str, encoder: str, variant: str) -> str:
        row = self._cells.get((data, encoder, variant)) or self._cells.get((data, encoder, MAJORITY))
        if row is None:
            return "-"
        main = row["metrics"][0]
        spread = f" ± {format_metric(main, row[f'{main}_std'])}" if row[f"{main}_std"] is not None else ""
        return format_metric(main, row[main]) + spread

    def differences(self) -> list[list[str]]:
        """Lines of DIFFERENCES: each row that can be compared with the first encoder of its data and variant."""
        compared = [(row, versus) for row in self._cells.values() if (versus := versus_of(row))]
        return [[row["data"], row["encoder"], row["variant"], *versus.cells()] for row, versus in compared]

    def print(self, title: str) -> None:
        """On the terminal."""
        table = _table(title, self.header, self.header[:2])
        previous = ""
        for data, *cells in self.lines():
            if previous and data != previous:
                table.add_section()
            table.add_row(*map(visible, (data if data != previous else "", *cells)))
            previous = data
        _print_table(table)
        if lines := self.differences():
            table = _table(_COMPARED, DIFFERENCES, DIFFERENCES[:3])
            for line in lines:
                table.add_row(*map(visible, line))
            _print_table(table)

    def markdown(self) -> str:
        """As a Markdown table."""
        rule = ["---", "---", *("---:" for _ in self._variants)]
        return "".join(markdown_line(line) for line in (self.header, rule, *self.lines()))

    def markdown_of_differences(self) -> str:
        """Likewise of the differences; empty without any."""
        rule, lines = ["---", "---", "---", "---:", "---:", "---:"], self.differences()
        return "".join(markdown_line(line) for line in (DIFFERENCES, rule, *lines)) if lines else ""


def _table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def _print_table(table: Table) -> None:
    """A terminal folds; a log or a pipe gets the table as wide as its text."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console, width = Console(**plain), Console(width=_WIDEST, **plain).measure(table).maximum
    (console if console.is_terminal else Console(width=width, **plain)).print(table)


# -- reading results back

_SOURCES = "train probe, fewshot, knn, zeroshot, retrieval, finetune, caption or eval"
_GIVE_OUT = "give the path of the evaluation's `--out`"


@dataclass(frozen=True)
class Row:
    """One encoder, evaluated by one variant of a protocol on one data set."""

    data: str
    encoder: str
    variant: str
    protocol: str
    metrics: dict[str, tuple[float | None, float | None]]  # name -> mean, deviation over seeds; the main one first
    seeds: int
    file: Path
    weights: str | None = None  # fingerprint of the encoder, None if the result has none
    text_tower: str | None = None  # likewise
    readout: str | None = None  # layer and pool of the features, in words
    tested: PerImage | None = None  # which of the test images it has right

    @property
    def main(self) -> str:
        """The name of the metric that tables show."""
        return next(iter(self.metrics))

    @property
    def run(self) -> Path:
        """The run whose own output was evaluated; for any other encoder, and other layers or pools, a path that is no
        run.
        """
        return Path(os.path.expanduser(self.encoder.removeprefix("run:"))).resolve()


def read_results(paths: Sequence[Path], *, may_be_none: bool = False) -> list[Row]:
    """All rows of `paths`, which are result files or folders with result files.

    Duplicates are kept once: a suite's cells are in its suite.json too, the majority class is in every result. A named
    file that is not a result, a damaged file, and unless `may_be_none` a folder without a result, are UserErrors.
    """
    contents: dict[Path, dict[str, Any]] = {}
    for path in paths:
        if not path.exists():
            allowed = "result JSONs, or folders with result JSONs"
            raise UserError(f"there is no {path}", allowed=allowed, fix=_GIVE_OUT)
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        read = {file.resolve(): _result(file, named=file == path) for file in files}
        results = {file: content for file, content in read.items() if content is not None}
        if not results and not may_be_none:
            raise UserError(
                f"{path} has no result",
                allowed=f"JSON files of {_SOURCES}",
                fix="evaluate first (`train probe ... --out results/probe.json`), or omit --results",
            )
        contents |= results
    in_suites = {cell for content in contents.values() for cell in content.get("cells", ())}
    protocols = {file.stem: content.get("protocol", "") for file, content in contents.items()}
    rows: dict[tuple[Any, ...], Row] = {}
    for file, content in contents.items():
        if file.stem not in in_suites:
            for row in _rows(file, content, protocols):
                rows.setdefault((row.data, row.encoder, row.variant, *row.metrics.items()), row)
    return list(rows.values())


def _result(file: Path, *, named: bool) -> dict[str, Any] | None:
    """The content of a result file; None for any other JSON file of the folder."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", fix="remove it and run the evaluation again") from None
    rows = content.get("results") if isinstance(content, dict) else None
    if isinstance(rows, list) and all(isinstance(row, dict) and {"encoder", "metrics"} <= row.keys() for row in rows):
        return content
    if named:
        raise UserError(f"{file} is not a result", allowed=f"a JSON of {_SOURCES}", fix=_GIVE_OUT)
    return None


def _rows(file: Path, content: dict[str, Any], protocols: dict[str, str]) -> Iterable[Row]:
    """`protocols`: file name -> protocol of single results, which a suite's rows refer to."""
    for row in content["results"]:
        metrics = {name: (row[name], row.get(f"{name}_std")) for name in row["metrics"]}
        protocol = content.get("protocol") or protocols.get(row.get("cell", ""), "")
        variant = row.get("variant", protocol)
        data, description = row.get("data", content.get("data", "?")), row.get("description", {})
        identity = description.get("weights"), description.get("text_tower"), readout_of(description)
        tested = tested_of({"data": data, "variant": variant, **row})
        yield Row(data, row["encoder"], variant, protocol, metrics, len(row.get("seeds", ())), file, *identity, tested)


def readout_of(description: dict[str, Any]) -> str | None:
    """Layer and pool of an encoder's description, in words; None if it has none."""
    if {"layer", "pool"} <= description.keys():
        return f"layer {description['layer']}, pool {description['pool']}"
    return None
