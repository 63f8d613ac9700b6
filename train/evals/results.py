"""Result JSONs of `train probe | fewshot | ... | eval` -> rows, for the report's tables and an export's card."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.storage import UserError

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

    @property
    def main(self) -> str:
        """The name of the metric that tables show."""
        return next(iter(self.metrics))

    @property
    def run(self) -> Path | None:
        """The run that was evaluated, None if the encoder is not a run."""
        kind, _, rest = self.encoder.partition(":")
        return Path(rest.partition(",")[0]).resolve() if kind == "run" else None


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
        yield Row(data, row["encoder"], variant, protocol, metrics, len(row.get("seeds", ())), file, *identity)


def readout_of(description: dict[str, Any]) -> str | None:
    """Layer and pool of an encoder's description, in words; None if it has none."""
    if {"layer", "pool"} <= description.keys():
        return f"layer {description['layer']}, pool {description['pool']}"
    return None
