"""The file of an ablation: its cells, the seeds of each, and the command lines that make one of them.

ablations.yaml -> Grid -> units (cell, seed) -> train run | clip, lit, probe, fewshot, zeroshot
-> WORK/cells/<cell>-seed<n>.json
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from labels import TokenizerKind
from labels.config import load_pipeline, read_yaml
from labels.settings import Pipeline, Section
from labels.storage import UserError, fingerprint

Metric = Literal["probe", "fewshot", "zeroshot"]
# Raise this with any change to how a cell is made: earlier results then count as outdated.
VERSION = 1
# Cost of a cell without its training, in samples of training.
_EVALUATION_SAMPLES = 6000


class TrainedTokenizer(Section):
    """Options of `preprocess train-tokenizer`."""

    kind: TokenizerKind
    vocab_size: Annotated[int, Field(gt=0)]


class LabelSet(Section):
    """Options of `build-labels`: keys of the section `labels`, and a tokenizer that is trained first."""

    set: Annotated[dict[str, Any], Field(default_factory=dict)]
    tokenizer: TrainedTokenizer | None = None


class Cell(Section):
    """One way of training; `set` overrides dotted keys, `seeds` those of the file."""

    method: Literal["superclass", "clip", "untrained"] = "superclass"
    labels: str | None = None
    zeroshot: bool = False
    set: Annotated[dict[str, Any], Field(default_factory=dict)]
    seeds: list[int] | None = None


class Row(Section):
    """A line of a table; `published` in percent."""

    name: str
    cell: str
    published: Annotated[dict[Metric, float], Field(default_factory=dict)]


class Table(Section):
    """A table like one of the paper's; `setting` describes these runs, `published` the paper's."""

    title: str
    setting: str
    published: str
    rows: Annotated[list[Row], Field(min_length=1)]


class Plot(Section):
    """Linear probe accuracy over the value of a dotted key, one line per list of cells."""

    file: str
    key: str
    label: str
    lines: dict[str, list[str]]


class EvaluationSet(Section):
    """See ablation_inputs.py."""

    side: Annotated[int, Field(gt=0)]
    least: Annotated[int, Field(gt=0)]


class Grid(Section):
    """The whole file. All cells use the images of the first label set."""

    seeds: Annotated[list[int], Field(min_length=1)]
    settings: dict[str, Any]
    evaluation: EvaluationSet
    labels: Annotated[dict[str, LabelSet], Field(min_length=1)]
    cells: Annotated[dict[str, Cell], Field(min_length=1)]
    lit: Annotated[dict[str, Any], Field(default_factory=dict)]
    tables: Annotated[list[Table], Field(default_factory=list)]
    plots: Annotated[list[Plot], Field(default_factory=list)]

    @property
    def first_labels(self) -> str:
        """The label set whose betons all cells are trained on."""
        return next(iter(self.labels))


def read_grid(file: Path) -> Grid:
    """Read and check the file of an ablation.

    Raises:
        UserError: names every key that is wrong, missing or unknown, or a cell or label set that does not exist.
    """
    try:
        grid = Grid.model_validate(read_yaml(file))
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)]
        raise UserError(
            "\n".join([f"{file} is no ablation:", *faults]),
            fix="correct these keys; for an example see examples/openclipart/ablations.yaml",
        ) from None
    named = [row.cell for table in grid.tables for row in table.rows]
    named += [cell for plot in grid.plots for cells in plot.lines.values() for cell in cells]
    for kind, known, names in (
        ("cell", grid.cells, named),
        ("label set", grid.labels, [cell.labels for cell in grid.cells.values()]),
    ):
        if unknown := [name for name in names if name is not None and name not in known]:
            raise UserError(f"{file} names the {kind} {unknown[0]!r}, which it does not have", allowed=", ".join(known))
    return grid


@dataclass(frozen=True)
class Unit:
    """One cell with one seed: the command lines of `train`, their output, and a fingerprint of everything that
    determines it.

    run: folder of the training. results: JSON of each evaluation. file: the result, written last. cost: for the ETA.
    """

    cell: str
    seed: int
    run: Path
    file: Path
    log: Path
    fingerprint: str
    commands: tuple[tuple[str, ...], ...]
    results: dict[str, Path]
    cost: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.cell}, seed {self.seed}"


class Planner:
    """The units of a grid in WORK, which has settings.yaml, labels/, evaluation/, untrained/ (ablation_inputs.py)."""

    def __init__(self, grid: Grid, work: Path) -> None:
        self.grid, self.work = grid, work
        self.config = work / "settings.yaml"

    def units(self) -> list[Unit]:
        """All units; the first seed of all cells first."""
        seeds_of = {
            name: cell.seeds if cell.seeds is not None else self.grid.seeds for name, cell in self.grid.cells.items()
        }
        seeds = dict.fromkeys(seed for cell_seeds in (self.grid.seeds, *seeds_of.values()) for seed in cell_seeds)
        return [self._unit(name, seed) for seed in seeds for name in seeds_of if seed in seeds_of[name]]

    def settings(self, name: str) -> Pipeline:
        """The resolved configuration of a cell, seed 0.

        Raises:
            UserError: a key of the cell that is not allowed.
        """
        return load_pipeline(self.config, _pairs(self.grid.cells[name].set))

    def _unit(self, name: str, seed: int) -> Unit:
        cell, settings = self.grid.cells[name], self.settings(name)
        parts = [
            VERSION,
            settings.model_dump(exclude={"recipes", "paths"}),
            cell.method,
            cell.zeroshot,
            seed,
            self.grid.lit,
        ]
        labels = self.grid.labels[cell.labels or self.grid.first_labels]
        mark = fingerprint([*parts, labels.model_dump(), self.grid.evaluation.model_dump()])
        run = self.work / "runs" / f"{name}-seed{seed}-{mark[:8]}"
        results: dict[str, Path] = {
            metric: run / f"{metric}.json" for metric in ("probe", "fewshot", *(["zeroshot"] * cell.zeroshot))
        }
        trainings = 0 if cell.method == "untrained" else 2 if cell.zeroshot and cell.method == "superclass" else 1
        return Unit(
            name,
            seed,
            run,
            self.work / "cells" / f"{name}-seed{seed}.json",
            self.work / "logs" / f"{name}-seed{seed}.txt",
            mark,
            tuple(self._commands(cell, seed, run, results)),
            results,
            _EVALUATION_SAMPLES + trainings * settings.train.samples,
        )

    def _commands(self, cell: Cell, seed: int, run: Path, results: dict[str, Path]) -> Iterator[tuple[str, ...]]:
        config = ("--config", str(self.config))
        labels = () if cell.labels is None else ("--labels", str(self.work / "labels" / cell.labels))
        data = ("--beton", str(self.work / "labels" / self.grid.first_labels), *labels, *config)
        seeded = cell.set | {"train.runtime.seed": seed}
        trained = f"run:{run}" if cell.method != "untrained" else f"untrained:{self.work / 'untrained'}"
        named = trained
        if cell.method != "untrained":
            yield ("run" if cell.method == "superclass" else "clip", *data, "--out", str(run), *_flags(seeded))
        if cell.zeroshot and cell.method == "superclass":
            named = f"run:{run / 'lit'}"
            yield ("lit", trained, *data, "--out", str(run / "lit"), *_flags(seeded | self.grid.lit))
        where = ("--data", f"parquet:{self.work / 'evaluation'}", "--cache", str(run / "features"), *config)
        for protocol, out in results.items():
            encoder = named if protocol == "zeroshot" else trained
            yield (protocol, "--encoder", encoder, *where, "--out", str(out), "--set", f"probe.seeds=[{seed}]")


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _flags(values: dict[str, Any]) -> list[str]:
    return [word for pair in _pairs(values) for word in ("--set", pair)]
