"""The runs of a report: config.yaml, data.json and metrics.jsonl of a run folder -> `Run` (recipe, steps, throughput),
and curves of several runs. A recipe has the dotted keys of everything that changes what is learnt: configuration,
labels, data; not those of the machine and of files.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labels.config import dotted, load_pipeline
from labels.settings import MACHINE, Pipeline, Train, marked_keys
from labels.show.html import Series
from labels.storage import UserError
from train.metrics import read_metrics

_POINTS, _RAW_POINTS = 200, 1_500
_DATA_KEYS = ("samples", "captions", "tokenizer", "vocabulary", "idf_formula")


@dataclass(frozen=True)
class Run:
    path: Path
    name: str  # on the page, unique among the runs
    recipe: dict[str, Any]  # dotted key -> value
    steps: list[dict[str, Any]]  # lines of metrics.jsonl with a loss, in order of samples
    throughput: list[dict[str, Any]]  # its lines with a rate, in order of samples
    damaged: list[int]  # numbers of its lines that cannot be read
    validation: list[dict[str, Any]]  # its lines with a loss of the held-out samples, in order of samples

    @property
    def samples(self) -> int:
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
            count = line.get("bad_images", 0)
            total += count - before if count >= before else count
            before = count
        return total

    def seconds(self) -> float:
        """Time in the loop, from the rates that were logged."""
        return sum((samples / line["samples_per_s"] for line, samples in self._intervals()), 0.0)

    def weighted_mean(self, key: str) -> float | None:
        """The mean of a throughput value, weighted by samples; None if no line has it."""
        weighted = [(line[key], samples) for line, samples in self._intervals() if key in line]
        total = sum(samples for _, samples in weighted)
        return sum(value * samples for value, samples in weighted) / total if total else None

    def _intervals(self) -> list[tuple[dict[str, Any], int]]:
        """Each line of throughput with the samples since the line before."""
        ends = [line["samples"] for line in self.throughput]
        return [(line, end - begin) for line, begin, end in zip(self.throughput, [0, *ends], ends, strict=False)]

    def last_loss(self, share: float = 0.01) -> float | None:
        """The mean loss over the last `share` of the steps, without skipped steps."""
        last = self.steps[-max(1, round(share * len(self.steps))) :]
        losses = [line["loss"] for line in last if line["loss"] is not None]
        return sum(losses) / len(losses) if losses else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read each run once; a path that is not a run, or a damaged configuration, is a UserError."""
    distinct = {path.resolve(): path for path in paths}
    names = _names(list(distinct))
    return [_read(path, names[resolved]) for resolved, path in distinct.items()]


def _read(path: Path, name: str) -> Run:
    for file in ("config.yaml", "metrics.jsonl"):
        if not (path / file).is_file():
            reason = f"it has no {file}" if path.is_dir() else "there is no such folder"
            written = "a folder written by `train run --out`"
            raise UserError(f"{path} is not a run: {reason}", allowed=written, fix="correct the path")
    lines, damaged = read_metrics(path / "metrics.jsonl")
    keys = ("loss", "samples_per_s", "validation_loss")
    steps, throughput, validation = ([line for line in lines if key in line] for key in keys)
    recipe_keys = recipe(load_pipeline(path / "config.yaml")) | _data_recipe(path / "data.json")
    return Run(path, name, recipe_keys, steps, throughput, damaged, validation)


def recipe(pipeline: Pipeline) -> dict[str, Any]:
    """The keys of the configuration that change what is learnt, dotted."""
    return dotted(pipeline.train.model_dump(exclude=marked_keys(Train, MACHINE)), "train.")


def _data_recipe(file: Path) -> dict[str, Any]:
    """What data.json says about the labels and images of the run."""
    try:
        facts = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", fix="resume the run: it writes the file again") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("label_options", {}), dict):
        fix = "resume the run: it writes the file again"
        raise UserError(f"{file} is damaged: it does not hold the facts of a run", fix=fix)
    values = {f"data.{key}": facts[key] for key in _DATA_KEYS if key in facts}
    values["data.method"] = facts.get("method", "superclass")
    return values | dotted(facts.get("label_options", {}), "labels.")


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys that differ between the runs; for a single run, keys of the configuration that differ from the defaults."""
    sides = [run.recipe for run in runs]
    if len(runs) == 1:
        defaults = recipe(Pipeline()) | dotted(Pipeline().labels.model_dump(), "labels.")
        sides = [defaults, {key: value for key, value in runs[0].recipe.items() if not key.startswith("data.")}]
    rows = {key: [side.get(key) for side in sides] for side in sides for key in side}
    different = {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
    return [(key, values[-len(runs) :]) for key, values in different.items() if values[-1] is not None]


def _names(paths: list[Path]) -> dict[Path, str]:
    """The last part of each path, with enough of its parents to make the names unique."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = {path: os.sep.join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {path: str(path) for path in paths}


def loss_curves(runs: Sequence[Run], shown: Sequence[Run]) -> list[Series]:
    """Curves of the runs in `shown`: means of neighbouring steps without the skipped ones, and for a single run its
    steps too. The position in `runs` decides a curve's colour.
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


def validation_curves(runs: Sequence[Run], shown: Sequence[Run], key: str) -> list[Series]:
    """One curve for each run in `shown` that has `key` in its validation lines: every measurement."""
    curves = []
    for hue, run in enumerate(runs):
        samples, values = _columns([line for line in run.validation if key in line], key)
        if run in shown and len(samples):
            curves.append(Series(samples.tolist(), values.tolist(), name=run.name if len(runs) > 1 else "", hue=hue))
    return curves


def binned(values: np.ndarray, points: int = _POINTS) -> np.ndarray:
    """Means of neighbours: float64 [N] -> [min(N, points)]."""
    edges = np.linspace(0, len(values), min(len(values), points) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges) if len(values) else values


def _columns(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([line["samples"] for line in lines], float), np.array([line[key] for line in lines], float)


def _series(samples: np.ndarray, values: np.ndarray, name: str, hue: int) -> Series:
    return Series(binned(samples).tolist(), binned(values).tolist(), name=name, hue=hue)
