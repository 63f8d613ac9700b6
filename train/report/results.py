"""Result JSONs of `train probe | fewshot | ... | eval`, in files and folders -> one list of rows, each measured thing once."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.errors import UserError

_SHARES = ("top", "r@", "recall", "accuracy")  # metrics told as shares of 1, by the beginning of their names


@dataclass(frozen=True)
class Row:
    """One encoder by one variant of a protocol on one data set.

    `metrics`: name -> (mean, deviation over seeds or None), the main one first; as the protocol gives them, see `told`.
    `weights`, `text_tower`: fingerprints of what was measured, None where the result does not say, or there is no text tower.
    `readout`: which layer's features by which pool, in words; None likewise.
    """

    data: str
    encoder: str
    variant: str
    protocol: str
    metrics: dict[str, tuple[float | None, float | None]]
    seeds: int
    file: Path
    weights: str | None = None
    text_tower: str | None = None
    readout: str | None = None

    @property
    def main(self) -> str:
        """The metric that tables show."""
        return next(iter(self.metrics))

    @property
    def run(self) -> Path | None:
        """The run that was measured, where the encoder is one."""
        kind, _, rest = self.encoder.partition(":")
        return Path(rest.partition(",")[0]).resolve() if kind == "run" else None


def read_results(places: Sequence[Path], *, may_be_none: bool = False) -> list[Row]:
    """All rows below `places`: result files, or folders that are searched for them.

    `may_be_none`: folders without a result are no error.
    What is found twice (a suite's cells stand in its suite.json too; the majority class in every result) is kept once.

    Raises:
        UserError: a named file is no result, a folder holds none, or a file is damaged.
    """
    found: dict[Path, dict[str, Any]] = {}
    for place in places:
        if not place.exists():
            raise UserError(
                f"there is no {place}",
                allowed="result JSONs, or folders that hold some",
                mend="name what `--out` of the measuring command was",
            )
        files = sorted(place.rglob("*.json")) if place.is_dir() else [place]
        read = {file.resolve(): content for file in files if (content := _result(file, named=file == place)) is not None}
        if not read and not may_be_none:
            raise UserError(
                f"{place} holds no result",
                allowed="JSON files of train probe, fewshot, knn, zeroshot, retrieval, finetune, caption or eval",
                mend="measure first (`train probe ... --out results/probe.json`), or leave out --results",
            )
        found |= read
    in_suites = {cell for content in found.values() for cell in content.get("cells", ())}
    protocols = {file.stem: content.get("protocol", "") for file, content in found.items()}
    rows: dict[tuple[Any, ...], Row] = {}
    for file, content in found.items():
        if file.stem not in in_suites:
            for row in _rows(file, content, protocols):
                rows.setdefault((row.data, row.encoder, row.variant, *row.metrics.items()), row)
    return list(rows.values())


def told(name: str, value: float | None) -> str:
    """A metric's value as tables tell it: shares of 1 in percent, others as they are."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if is_share(name) else f"{value:.1f}"


def is_share(name: str) -> bool:
    """Whether a metric is a share of 1, told in percent."""
    return name.startswith(_SHARES)


def _result(file: Path, *, named: bool) -> dict[str, Any] | None:
    """What a result file holds; None for another JSON that merely lies in the folder."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", mend="remove it; the command that wrote it measures again") from None
    rows = content.get("results") if isinstance(content, dict) else None
    if isinstance(rows, list) and all(isinstance(row, dict) and {"encoder", "metrics"} <= row.keys() for row in rows):
        return content
    if named:
        raise UserError(
            f"{file} is no result",
            allowed="a JSON of train probe, fewshot, knn, zeroshot, retrieval, finetune, caption or eval",
            mend="name what `--out` of the measuring command was",
        )
    return None


def _rows(file: Path, content: dict[str, Any], protocols: dict[str, str]) -> Iterable[Row]:
    """`protocols`: of single results, by the names of their files, which a suite's rows refer to."""
    for row in content["results"]:
        metrics = {name: (row[name], row.get(f"{name}_std")) for name in row["metrics"]}
        protocol = content.get("protocol") or protocols.get(row.get("cell", ""), "")
        variant = row.get("variant", protocol)
        data, about = row.get("data", content.get("data", "?")), row.get("description", {})
        prints = about.get("weights"), about.get("text_tower"), readout_of(about)
        yield Row(data, row["encoder"], variant, protocol, metrics, len(row.get("seeds", ())), file, *prints)


def readout_of(about: dict[str, Any]) -> str | None:
    """Layer and pool of an encoder's description, in words; None where it does not say."""
    return f"layer {about['layer']}, pool {about['pool']}" if {"layer", "pool"} <= about.keys() else None
