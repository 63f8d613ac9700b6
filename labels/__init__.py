"""The contract between the two stages: what `preprocess` writes and `train` reads.

Light by design: numpy, pyarrow, duckdb, pydantic and yaml, no torch, no orchestration and no produced data.
"""

__version__ = "0.1.0"
