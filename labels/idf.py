"""Inverse document frequency (IDF): formulas, the table idf.parquet, and the target weights of one caption.

N captions, V vocabulary entries, df(c) = number of captions that contain token c, natural logarithm.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from labels import Formula
from labels.manifest import TOKENS
from labels.storage import UserError, local_copy


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
