"""The contract between the two stages: what `preprocess` writes and `train` reads.

Light by design: numpy, pyarrow, duckdb, pydantic and yaml, no torch. This file imports nothing, for a fast `--help`.
"""

from typing import Literal

__version__ = "0.1.0"

Formula = Literal["smooth", "paper", "none"]
"""IDF formulas, see labels/idf.py."""

Combination = Literal["idf*gain", "idf*sqrt(gain)", "gain"]
"""Of IDF and visual gain to the weights of the loss, see labels/idf.py."""

TokenizerKind = Literal["bpe", "wordpiece", "unigram", "wordlevel", "catlip"]
"""Of `preprocess train-tokenizer --kind`."""
