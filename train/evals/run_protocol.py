"""`train probe | fewshot | knn | ... | caption`: one protocol for some encoders on one data set, as a table and a result JSON."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from labels.errors import UserError
from labels.settings import Pipeline
from labels.storage import write_json
from train.encoders.encoder import EncoderSpec
from train.encoders.load import load_encoder
from train.evals.data.captions import CaptionSet
from train.evals.data.sets import DataSet, load_data, load_pair
from train.evals.features import Extractor
from train.evals.measure import floor_rows, measure, result, write_splits
from train.evals.protocol import Evaluation
from train.evals.tables import print_rows


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
    """Measure every encoder, print one row for each and, of classes, one for the majority class, write the result and what was drawn.

    Args:
        load: gives the data set; called when the encoders are known to be sound.
        out: the result JSON; splits lie beside it, as <name>.splits.parquet.

    Returns:
        What the JSON holds: accuracies as fractions of 1, seconds of wall clock.

    Raises:
        UserError: whatever does not fit, before anything expensive begins.
    """
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a directory", allowed="the path of a file", mend=f"--out {out / (evaluation.name + '.json')}")
    settings = evaluation.settings(pipeline)
    loaded = [load_encoder(asked) for asked in encoders]  # all of them: a mistake in the last one must not cost the others' time
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
