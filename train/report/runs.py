"""What a report says about runs: RUN/config.yaml, data.json and metrics.jsonl -> recipe, facts, curves.

N steps, P points of a curve.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labels.config import load_pipeline
from labels.html import Series
from labels.settings import MACHINE, Pipeline, Train, marked_keys
from labels.storage import UserError

_POINTS, _RAW_POINTS = 200, 1_500
_DATA_KEYS = ("samples", "captions", "tokenizer", "vocabulary", "idf_formula")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: its name on the page, unique among the runs.
        recipe: dotted key -> value, for everything that changes what is learnt: configuration, labels, data.
        facts: data.json.
        steps, throughput: lines of metrics.jsonl, in order of samples.
    """

    path: Path
    name: str
    recipe: dict[str, Any]
    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    throughput: list[dict[str, Any]]

    @property
    def samples(self) -> int:
        """Samples seen."""
        return self.steps[-1]["samples"] if self.steps else 0

    @property
    def budget(self) -> int:
        """Samples of a finished run: whole batches."""
        batch = self.recipe["train.batch_size"]
        return self.recipe["train.samples"] // batch * batch

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite."""
        return sum("skipped" in line for line in self.steps)

    @property
    def bad_images(self) -> int:
        """Images that did not decode, over all epochs."""
        total, before = 0, 0
        for line in self.throughput:  # the count starts at 0 after each resume
            now = line.get("bad_images", 0)
            total += now - before if now >= before else now
            before = now
        return total

    def seconds(self) -> float:
        """Time in the loop, from the rates that were logged."""
        total, before = 0.0, 0
        for line in self.throughput:
            total += (line["samples"] - before) / line["samples_per_s"]
            before = line["samples"]
        return total

    def weighed(self, key: str) -> float | None:
        """The mean of a throughput value, weighted by samples; None if no line has it."""
        parts, before = [], 0
        for line in self.throughput:
            if key in line:
                parts.append((line[key], line["samples"] - before))
            before = line["samples"]
        weight = sum(part for _, part in parts)
        return sum(value * part for value, part in parts) / weight if weight else None

    def last_loss(self, share: float = 0.01) -> float | None:
        """The mean loss over the last `share` of the steps, without skipped steps."""
        tail = [
            line["loss"] for line in self.steps[-max(1, round(share * len(self.steps))) :] if line["loss"] is not None
        ]
        return sum(tail) / len(tail) if tail else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read each run once.

    Raises:
        UserError: a path is not a run, or a file of it is damaged.
    """
    distinct = {path.resolve(): path for path in paths}
    names = _names(list(distinct))
    return [_read(path, names[resolved]) for resolved, path in distinct.items()]


def _read(path: Path, name: str) -> Run:
    for file in ("config.yaml", "metrics.jsonl"):
        if not (path / file).is_file():
            reason = f"it has no {file}" if path.is_dir() else "there is no such folder"
            raise UserError(
                f"{path} is not a run: {reason}",
                allowed="a folder written by `train run --out`",
                fix="correct the path",
            )
    facts = _json(path / "data.json") if (path / "data.json").is_file() else {}
    lines = _lines(path / "metrics.jsonl")
    steps, throughput = [line for line in lines if "loss" in line], [line for line in lines if "samples_per_s" in line]
    pipeline = load_pipeline(path / "config.yaml")
    return Run(path, name, recipe(pipeline) | _data_recipe(facts), facts, steps, throughput)


def recipe(pipeline: Pipeline) -> dict[str, Any]:
    """The keys of the configuration that change what is learnt, dotted."""
    return _flat("train.", pipeline.train.model_dump(exclude=marked_keys(Train, MACHINE)))


def _data_recipe(facts: dict[str, Any]) -> dict[str, Any]:
    """What data.json says about the labels and images of the run."""
    values = {f"data.{key}": facts[key] for key in _DATA_KEYS if key in facts}
    values["data.method"] = facts.get("method", "superclass")
    return values | _flat("labels.", facts.get("label_options", {}))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys that differ between the runs; for a single run, keys of the configuration that differ from the defaults."""
    sides = [run.recipe for run in runs]
    if len(runs) == 1:
        defaults = recipe(Pipeline()) | _flat("labels.", Pipeline().labels.model_dump())
        sides = [defaults, {key: value for key, value in runs[0].recipe.items() if not key.startswith("data.")}]
    keys = dict.fromkeys(key for side in sides for key in side)
    rows = [(key, [side.get(key) for side in sides]) for key in keys]
    return [
        (key, values[-len(runs) :])
        for key, values in rows
        if any(value != values[0] for value in values) and values[-1] is not None
    ]


def _names(paths: list[Path]) -> dict[Path, str]:
    """The last part of each path, with enough of its parents to make the names unique."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = {path: os.sep.join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {path: str(path) for path in paths}


def _lines(file: Path) -> list[dict[str, Any]]:
    """All lines; the last one may be cut, in a run that is writing or was killed."""
    texts = file.read_text(encoding="utf8").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(texts):
                break
            raise UserError(
                f"{file}: line {number} is damaged", fix="resume the run: it drops the lines after its last checkpoint"
            ) from None
        lines.append(line)
    return lines


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", fix="resume the run: it writes the file again") from None


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(f"{name}.", value) if isinstance(value, dict) and value else {name: value}
    return flat


def loss_curves(runs: Sequence[Run], shown: Sequence[Run]) -> list[Series]:
    """Curves of the runs in `shown`: means of neighbouring steps without the skipped ones, and for a single run its
    steps too.

    The position in `runs` decides a curve's colour.
    """
    curves = []
    for hue, run in enumerate(runs):
        if run not in shown:
            continue
        samples, losses = _columns([line for line in run.steps if line["loss"] is not None], "loss")
        if len(runs) == 1 and len(samples):
            kept = np.unique(np.linspace(0, len(samples) - 1, _RAW_POINTS).round().astype(int))
            curves.append(Series(samples[kept].tolist(), losses[kept].tolist(), "faint"))
        curves.append(_series(samples, losses, run.name if len(runs) > 1 else "", hue))
    return [curve for curve in curves if len(curve.xs)]


def throughput_curves(runs: Sequence[Run], key: str, factor: float = 1.0) -> list[Series]:
    """One curve for each run that has `key` in its throughput lines; the values are multiplied by `factor`."""
    curves = []
    for hue, run in enumerate(runs):
        samples, values = _columns([line for line in run.throughput if key in line], key)
        if len(samples):
            curves.append(_series(samples, values * factor, run.name if len(runs) > 1 else "", hue))
    return curves


def binned(values: np.ndarray, points: int = _POINTS) -> np.ndarray:
    """Means of neighbours: float64 [N] -> [min(N, P)]."""
    edges = np.linspace(0, len(values), min(len(values), points) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges) if len(values) else values


def _columns(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([line["samples"] for line in lines], float), np.array([line[key] for line in lines], float)


def _series(samples: np.ndarray, values: np.ndarray, name: str, hue: int) -> Series:
    return Series(binned(samples).tolist(), binned(values).tolist(), name=name, hue=hue)
