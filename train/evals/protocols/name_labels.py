"""Texts -> label sets, or tokens in order, by stage 1 itself: labelled as captions are, with the tokenizer and options of a build.

The stages share no code, so `preprocess build-labels` is called as a user would call it, over a table of the texts.
"""

import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from labels.errors import UserError
from labels.layout import Layout
from labels.manifest import read_manifest
from labels.rows import Column

# Of the build's options these are not for names: word pairs are chosen by the corpus, samples by its metadata.
_OVERRIDES = ("labels.ngrams=1", "build.subset=null", "build.caption_key=[csv:caption]", "build.max_bad_fraction=1.0", "build.engine=local")


def label_texts(texts: Sequence[str], built: Path, column: Column = "label_ids") -> list[np.ndarray]:
    """The label ids of each text, as a caption of the build `built` would have them: int64, ascending, without repetition; or its
    `token_ids`, in order, at most as many as the build's context.

    Raises:
        UserError: stage 1 fails, or labels with another tokenizer now than when `built` was made.
    """
    with tempfile.TemporaryDirectory() as folder:
        table, out = Path(folder) / "names.csv", Path(folder) / "out"
        with open(table, "w", newline="", encoding="utf8") as stream:
            csv.writer(stream).writerows([("path", "caption"), *((index, text) for index, text in enumerate(texts))])
        _build(table, out, built)
        was, now = read_manifest(built).tokenizer.fingerprint, read_manifest(out).tokenizer.fingerprint
        if was != now:
            raise UserError(
                f"texts are labelled with the tokenizer {now[:16]}, {built} was with {was[:16]}",
                allowed="the tokenizer, and the versions of ftfy and regex, that the labels were made with",
                mend="install these versions, or label again and train on that",
            )
        rows = pq.read_table(Layout(out).label_file(table.stem), columns=["key", column])
        found = {int(key): np.array(ids, np.int64) for key, ids in zip(rows["key"].to_pylist(), rows[column].to_pylist(), strict=True)}
    return [found.get(index, np.empty(0, np.int64)) for index in range(len(texts))]


def _build(table: Path, out: Path, built: Path) -> None:
    command = [sys.executable, "-m", "preprocess", "build-labels", str(table), "--out", str(out), "--no-beton", "--workers", "1"]
    command += ["--config", str(Layout(built).config), *(word for override in _OVERRIDES for word in ("--set", override))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"texts cannot be labelled as in {built}: {ended.stderr.strip()}")
