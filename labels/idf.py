"""Label weights: IDF, which says how rare a token is, and visual gain, which says whether images decide it.

    document frequencies -> idf_weights -> idf.parquet -> read_idf -> target_weights: the target of one caption
    sums over held-out samples (train/losses/gains.py) -> calibrate -> visual.parquet -> combined with IDF

The gain of token c, in nats, is how much better a trained model predicts it on images whose caption has it:

    g_c = mean over samples with c of log p(c|x) - mean over all samples of log p(c|x)

A rare token's gain is measured on few samples. It is therefore pulled towards the mean gain of tokens of its frequency
(empirical Bayes: a normal prior for each band of frequencies, whose mean and variance are estimated from the band). The
mean of all tokens would be a worse prior: frequent tokens are mostly grammar, rare ones mostly things and names.
N captions, V vocabulary entries, df(c) = number of captions that contain token c, natural logarithm.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labels import Combination, Formula
from labels.manifest import TOKENS, TokenizerPart
from labels.storage import UserError, local_copy, write_whole

VISUAL = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("document_frequency", pa.int64(), nullable=False),
        pa.field("idf", pa.float64(), nullable=False),
        pa.field("samples", pa.int64(), nullable=False),  # held-out samples that have the token
        pa.field("gain", pa.float64()),  # as measured; null without samples
        pa.field("standard_error", pa.float64()),  # of `gain`; null with less than two samples
        pa.field("visual_gain", pa.float64(), nullable=False),  # calibrated, at least 0
        pa.field("weight", pa.float64(), nullable=False),  # idf * visual_gain
    ]
)
_FACTS = b"superclass.visual"
_BAND_TOKENS = 32
FREQUENT_SHARE = 0.002  # of the captions: a token in more of them is called frequent where the extremes are shown


def idf_weights(document_frequency: np.ndarray, captions: int, formula: Formula) -> np.ndarray:
    """document_frequency int64 [V] -> IDF of every token, float64 [V], not negative."""
    df = document_frequency.astype(np.float64)
    if formula == "smooth":  # of the reference code (x-cls/superclass, ClsLoss), but exact and offline
        return np.log((captions + 1.0) / (df + 1.0))
    if formula == "paper":  # SuperClass, section 3.2; clamped at 0 where df = N
        return np.maximum(np.log(max(captions, 1) / (df + 1.0)), 0.0)
    if formula == "none":
        return np.ones_like(df)
    raise UserError(f"unknown IDF formula {formula!r}", allowed="smooth, paper, none", fix="set labels.idf")


def read_idf(path: Path) -> np.ndarray:
    """The `idf` column of idf.parquet as float32 [V]; row number = token id. UserError: there is no such table."""
    fix = "run `preprocess build-labels` for this output folder again"
    if not path.is_file():
        raise UserError(f"no IDF table at {path}", fix=fix)
    try:
        # Not pq.read_table, whose threads close the file some time later.
        with local_copy(path) as file, pq.ParquetFile(file, pre_buffer=False) as opened:
            table = opened.read(use_threads=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as Parquet: {error}", fix=fix) from None
    if table.schema.names != TOKENS.names:
        raise UserError(f"{path} has the columns {table.schema.names}", allowed=f"{TOKENS.names}", fix=fix)
    if not np.array_equal(table["token_id"].to_numpy(), np.arange(len(table))):
        raise UserError(f"{path}: token_id is not 0, 1, 2, ... in order", fix=fix)
    return table["idf"].to_numpy().astype(np.float32)


def target_weights(idf: np.ndarray) -> np.ndarray:
    """The loss's target for one caption with L labels: t_c = w_c / sum of w (SuperClass, section 3.2), float64 [L].

    It sums to 1, or to 0 if no label has weight.
    """
    total = idf.sum(dtype=np.float64)
    return idf / total if total > 0 else np.zeros(len(idf))


# -- visual gain


@dataclass(frozen=True)
class Sums:
    """Sums of log p(c|x), float64 [V], over `samples` held-out samples; they can be added."""

    samples: int
    everywhere: np.ndarray  # over all samples
    count: np.ndarray  # int64 [V], samples that have the token
    bearing: np.ndarray  # over these
    squares: np.ndarray  # of the squares over these


@dataclass(frozen=True)
class Gains:
    """Float64 [V] each; NaN where nothing was measured."""

    gain: np.ndarray
    standard_error: np.ndarray
    visual_gain: np.ndarray


def calibrate(sums: Sums, document_frequency: np.ndarray) -> Gains:
    """Gains as measured, and pulled towards the mean of tokens of the same frequency, cut at 0.

    `document_frequency` int64 [V] is that of the training captions: it makes the bands.
    """
    n = sums.count.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(n > 0, sums.bearing / n - sums.everywhere / sums.samples, np.nan)
        within = np.maximum(sums.squares - sums.bearing**2 / n, 0.0)  # sums of squares around the token's own mean
        standard_error = np.where(n > 1, np.sqrt(within / (n - 1) / n), np.nan)
    calibrated = np.zeros(len(n))
    for band in _bands(document_frequency, sums.count):
        seen = band[sums.count[band] > 0]
        degrees = (n[seen] - 1).sum()
        if len(seen) < 3 or not degrees:
            calibrated[seen] = gain[seen]
            continue
        variance = within[seen].sum() / degrees / n[seen]  # of each gain; a token's own few samples say too little
        mean, spread = _prior(gain[seen], np.maximum(variance, 1e-12))
        calibrated[band] = mean
        calibrated[seen] = mean + spread / (spread + variance) * (gain[seen] - mean)
    return Gains(gain, standard_error, np.maximum(calibrated, 0.0))


def _bands(document_frequency: np.ndarray, count: np.ndarray) -> list[np.ndarray]:
    """Token ids by falling frequency, in parts of a factor of two or wider, each with some measured tokens."""
    order = np.argsort(-document_frequency, kind="stable")
    order = order[document_frequency[order] > 0]
    octave = np.floor(np.log2(document_frequency[order]))
    bands: list[np.ndarray] = []
    for part in np.split(order, np.flatnonzero(np.diff(octave)) + 1):
        if bands and (count[bands[-1]] > 0).sum() < _BAND_TOKENS:
            bands[-1] = np.concatenate([bands[-1], part])
        else:
            bands.append(part)
    if len(bands) > 1 and (count[bands[-1]] > 0).sum() < _BAND_TOKENS:
        bands[-2:] = [np.concatenate(bands[-2:])]
    return bands


def _prior(gain: np.ndarray, variance: np.ndarray) -> tuple[float, float]:
    """Mean and variance of the true gains of a band, by moments (DerSimonian and Laird, 1986)."""
    precision = 1 / variance
    total = precision.sum()
    fixed = (precision * gain).sum() / total
    excess = (precision * (gain - fixed) ** 2).sum() - (len(gain) - 1)
    spread = max(excess / (total - (precision**2).sum() / total), 0.0)
    share = 1 / (spread + variance)
    return float((share * gain).sum() / share.sum()), float(spread)


def write_visual(
    path: Path, tokens: pa.Table, idf: np.ndarray, sums: Sums, gains: Gains, facts: dict[str, Any]
) -> None:
    """Write visual.parquet. `tokens`: idf.parquet; `idf` [V]: the IDF in use; `facts`: JSON values."""
    idf = idf.astype(np.float64)
    columns = [
        *(tokens[name] for name in ("token_id", "token", "document_frequency")),
        pa.array(idf),
        pa.array(sums.count),
        pa.array(gains.gain, from_pandas=True),
        pa.array(gains.standard_error, from_pandas=True),
        pa.array(gains.visual_gain),
        pa.array(idf * gains.visual_gain),
    ]
    schema = VISUAL.with_metadata({_FACTS: json.dumps(facts, sort_keys=True)})
    table = pa.table(columns, schema=schema)
    write_whole(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def read_visual(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the facts of a visual.parquet. UserError: there is none, or it is another table."""
    fix = f"run `train weigh RUN --out {path}`"
    if not path.is_file():
        raise UserError(f"no table of visual weights at {path}", fix=fix)
    try:
        with pq.ParquetFile(path, pre_buffer=False) as opened:
            table = opened.read(use_threads=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as Parquet: {error}", fix=fix) from None
    if table.schema.names != VISUAL.names:
        raise UserError(f"{path} has the columns {table.schema.names}", allowed=f"{VISUAL.names}", fix=fix)
    return table, json.loads((table.schema.metadata or {}).get(_FACTS, b"{}"))


def read_gains(path: Path, tokenizer: TokenizerPart, out: Path) -> np.ndarray:
    """The `visual_gain` column, float64 [V]; UserError where the table is of another vocabulary than that of `out`."""
    table, facts = read_visual(path)
    if facts.get("tokenizer_fingerprint") != tokenizer.fingerprint or len(table) != tokenizer.vocabulary:
        raise UserError(
            f"{path} has the weights of {len(table):,} other tokens than the {tokenizer.vocabulary:,} of {out} "
            f"({tokenizer.name})",
            fix="run `train weigh` with a run on these labels",
        )
    return table["visual_gain"].to_numpy()


def newest_visual(run: Path) -> Path | None:
    """The newest table that a run with `train.weights: visual` has made of its own gains; None if there is none."""
    return max((run / "visual").glob("samples-*.parquet"), default=None)


def combined(idf: np.ndarray, visual_gain: np.ndarray, combination: Combination, floor: float) -> np.ndarray:
    """Weights of the loss, float32 [V], of IDF [V] and calibrated gains [V].

    `floor`, in nats, is added to each gain: where a model has learnt nothing yet, the weights are those of IDF.
    """
    visual_gain = visual_gain + floor
    if combination == "gain":
        return visual_gain.astype(np.float32)
    return (idf * (visual_gain if combination == "idf*gain" else np.sqrt(visual_gain))).astype(np.float32)
