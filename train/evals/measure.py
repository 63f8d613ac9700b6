"""One protocol, one encoder, one data set -> rows for tables and result JSONs, and the splits that were drawn, for the disk."""

import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from labels.settings import Pipeline
from labels.storage import write_whole
from train.encoders.encoder import Encoder
from train.encoders.load import load_encoder
from train.evals.data.captions import CaptionSet
from train.evals.data.images import LabelledImages
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.pixels import TRANSFORM
from train.evals.protocol import Evaluation, Score
from train.evals.protocols.lbfgs_probe import majority

MAJORITY = "majority class"
_VERSIONS = ("torch", "timm", "numpy", "pillow", "transformers", "open_clip_torch")
SPLITS = pa.schema([("encoder", pa.string()), ("variant", pa.string()), ("seed", pa.int64()), ("key", pa.string()), ("class", pa.string())])
"""One row a training sample that was drawn: shots of a fewshot, or the validation part of a probe; in the order of drawing."""


class Measured(NamedTuple):
    """`rows`: one a variant, JSON values. `splits`: a table of SPLITS, without rows where nothing was drawn."""

    rows: list[dict[str, Any]]
    splits: pa.Table


def measure(evaluation: Evaluation, encoder: Encoder, data: DataSet | CaptionSet, pipeline: Pipeline, extract: Extractor) -> Measured:
    """All seeds of one encoder. A seeded one is drawn anew for each, so that its spread includes the initialisation.

    Each row: encoder, variant, description; `metrics`, the names of what was measured, the main one first; each of them as the mean over
    seeds, with `_std` (n - 1) and `_standard_error` (what the size of the test part alone leaves); and `seeds`: every seed's metrics,
    details, weights and the fingerprint of its split.
    """
    settings: Any = evaluation.settings(pipeline)
    train = data.train if isinstance(data, DataSet) else None
    began = time.monotonic()
    scores: list[tuple[Score, str]] = []
    for group in [[seed] for seed in settings.seeds] if encoder.seeded else [list(settings.seeds)]:
        drawn = load_encoder(encoder.asked, seed=group[0]) if encoder.seeded else encoder
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
    evaluation: Evaluation, data: DataSet | CaptionSet, pipeline: Pipeline, extract: Extractor, rows: list[dict[str, Any]]
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
