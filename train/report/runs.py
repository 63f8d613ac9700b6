"""A run as its report needs it: RUN/config.yaml, data.json and metrics.jsonl -> recipe, facts, curves."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.config import load_pipeline
from labels.errors import UserError
from labels.settings import Pipeline

# What a run says of its machine and its files, not of what it learns.
_NOT_RECIPE = (
    "train.runtime.device",
    "train.runtime.threads",
    "train.runtime.peak_tflops",
    "train.checkpoint.",
    "train.log.",
    "train.data.cache",
    "train.data.verify",
)
_DATA_KEYS = ("samples", "captions", "tokenizer", "vocabulary", "idf_formula")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: what the page calls it, unlike that of any other run.
        recipe: dotted key -> value, of all that decides what is learnt: configuration, labels, data.
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
        """Samples that it is to see: whole batches."""
        batch = self.recipe["train.batch_size"]
        return self.recipe["train.samples"] // batch * batch

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite."""
        return sum("skipped" in line for line in self.steps)

    @property
    def bad_images(self) -> int:
        """Images that did not decode, over all passes."""
        total, before = 0, 0
        for line in self.throughput:  # each process counts from 0
            now = line.get("bad_images", 0)
            total += now - before if now >= before else now
            before = now
        return total

    def seconds(self) -> float:
        """Time in the loop, from the rates; without what a killed process had not written."""
        total, before = 0.0, 0
        for line in self.throughput:
            total += (line["samples"] - before) / line["samples_per_s"]
            before = line["samples"]
        return total

    def weighed(self, key: str) -> float | None:
        """The mean of a throughput line's value over samples; None where no line has it."""
        parts, before = [], 0
        for line in self.throughput:
            if key in line:
                parts.append((line[key], line["samples"] - before))
            before = line["samples"]
        weight = sum(part for _, part in parts)
        return sum(value * part for value, part in parts) / weight if weight else None

    def last_loss(self, share: float = 0.01) -> float | None:
        """The mean loss over the last share of the steps, skipped ones left out."""
        tail = [line["loss"] for line in self.steps[-max(1, round(share * len(self.steps))) :] if line["loss"] is not None]
        return sum(tail) / len(tail) if tail else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read them all, each once.

    Raises:
        UserError: no run, or a file of it is damaged.
    """
    distinct = {path.resolve(): path for path in paths}
    names = _names(list(distinct))
    return [_read(path, names[resolved]) for resolved, path in distinct.items()]


def _read(path: Path, name: str) -> Run:
    for file in ("config.yaml", "metrics.jsonl"):
        if not (path / file).is_file():
            there = f"it has no {file}" if path.is_dir() else "there is no such folder"
            raise UserError(f"{path} is no run: {there}", allowed="a folder that `train run --out` has written", mend="mend the path")
    facts = _json(path / "data.json") if (path / "data.json").is_file() else {}
    lines = _lines(path / "metrics.jsonl")
    steps, throughput = [line for line in lines if "loss" in line], [line for line in lines if "samples_per_s" in line]
    pipeline = load_pipeline(path / "config.yaml")
    return Run(path, name, recipe(pipeline) | _data_recipe(facts), facts, steps, throughput)


def recipe(pipeline: Pipeline) -> dict[str, Any]:
    """What the configuration says of the training, as dotted keys."""
    flat = _flat("train.", pipeline.train.model_dump())
    return {key: value for key, value in flat.items() if not key.startswith(_NOT_RECIPE)}


def _data_recipe(facts: dict[str, Any]) -> dict[str, Any]:
    """What data.json says of the labels and images trained on."""
    found = {f"data.{key}": facts[key] for key in _DATA_KEYS if key in facts}
    found["data.method"] = facts.get("method", "superclass")
    return found | _flat("labels.", facts.get("label_options", {}))


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys whose values differ between runs; for a single run, keys of the configuration that differ from the built-in defaults."""
    sides = [run.recipe for run in runs]
    if len(runs) == 1:
        defaults = recipe(Pipeline()) | _flat("labels.", Pipeline().labels.model_dump())
        sides = [defaults, {key: value for key, value in runs[0].recipe.items() if not key.startswith("data.")}]
    keys = dict.fromkeys(key for side in sides for key in side)
    rows = [(key, [side.get(key) for side in sides]) for key in keys]
    return [(key, values[-len(runs) :]) for key, values in rows if any(value != values[0] for value in values) and values[-1] is not None]


def _names(paths: list[Path]) -> dict[Path, str]:
    """Each path's last part, with as many of those above it as tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = {path: os.sep.join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    return {path: str(path) for path in paths}


def _lines(file: Path) -> list[dict[str, Any]]:
    """All lines; the last one may be cut, while a run goes on or after a kill."""
    texts = file.read_text(encoding="utf8").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(texts):
                break
            raise UserError(f"{file}: line {number} is damaged", mend="the run's own command drops what follows a checkpoint") from None
        lines.append(line)
    return lines


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}", mend="the run's own command writes it anew") from None


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(f"{name}.", value) if isinstance(value, dict) and value else {name: value}
    return found
