"""Tests for examples/openclipart/ablations.py: two cells with two seeds on tiny drawings, stopped and run again; lanes
that fail or die.
"""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from beton_factory import write_shards
from example_scripts import SCRIPTS, script
from labels.storage import UserError

ablation_grid = script("ablation_grid")
ablation_inputs = script("ablation_inputs")
ablation_tables = script("ablation_tables")
ablation_units = script("ablation_units")
ablations = script("ablations")

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = """
seeds: [0, 1]
settings:
  build: {workers: 1}
  train:
    samples: 64
    batch_size: 16
    model:
      {trunk: vit_tiny_patch16_224, trunk_args: {patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}, image_size: 16}
    optimizer: {warmup_samples: 16}
    runtime: {device: cpu, precision: fp32, threads: 1}
    log: {tensorboard: false}
  probe: {weight_decay: [0.1]}
  fewshot: {shots: [2]}
evaluation: {side: 16, least: 4}
labels:
  words: {tokenizer: {kind: wordlevel, vocab_size: 32}}
cells:
  small: {}
  smaller: {set: {train.model.trunk_args.embed_dim: 12}}
tables:
  - title: Widths
    setting: one layer
    published: not at all
    rows: [{name: 24, cell: small, published: {probe: 50}}, {name: 12, cell: smaller}]
plots: [{file: widths.png, key: train.model.trunk_args.embed_dim, label: width, lines: {one: [smaller, small]}}]
"""


def write_grid(folder: Path, **changes: Any) -> Path:
    grid = yaml.safe_load(GRID.replace("name: 24", 'name: "24"').replace("name: 12", 'name: "12"'))
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid | changes, sort_keys=False))
    return folder / "grid.yaml"


def test_stopped_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "data" / "train", [40])
    write_shards(tmp_path / "data" / "test", [12])
    grid, work = write_grid(tmp_path), tmp_path / "work"
    calls: list[str] = []
    done = ablation_units._train

    def train(words: tuple[str, ...]) -> None:
        calls.append(words[0])
        if len(calls) == 5:  # the probe of the second unit
            raise KeyboardInterrupt
        done(words)

    def in_this_process(units: list[Any], jobs: int, report: Any) -> None:
        for unit in units:
            report(unit, ablation_units.run_unit(unit))

    monkeypatch.setattr(ablation_units, "_train", train)
    monkeypatch.setattr(ablations, "run_units", in_this_process)
    assert ablations.run(grid, tmp_path / "data", work, 1) == 1
    assert calls == ["run", "probe", "fewshot", "run", "probe", "run", "probe", "fewshot", "run", "probe", "fewshot"]
    said = capsys.readouterr()
    assert "failed: smaller, seed 0: KeyboardInterrupt" in said.err and "[4/4]" in said.out
    assert "Finished: 3 of 4" in (work / "tables.md").read_text()
    kept = {file.name: file.read_bytes() for file in (work / "cells").iterdir()}
    assert set(kept) == {"small-seed0.json", "small-seed1.json", "smaller-seed1.json"}

    calls.clear()
    calls += [""] * 5
    assert ablations.run(grid, tmp_path / "data", work, 1) == 0
    assert calls[5:] == ["run", "probe", "fewshot"]
    assert "is finished: 64 samples seen" in (work / "logs" / "smaller-seed0.txt").read_text()
    assert {file.name: file.read_bytes() for file in (work / "cells").iterdir() if file.name in kept} == kept
    assert ablations.run(grid, tmp_path / "data", work, 1) == 0 and len(calls) == 8
    assert not list(work.glob("runs/*/checkpoints")) and (work / "widths.png").stat().st_size

    def probe(cell: str, seed: int) -> float:
        return json.loads((work / "cells" / f"{cell}-seed{seed}.json").read_text())["metrics"]["probe"]

    probes = [[probe(cell, seed) for seed in (0, 1)] for cell in ("small", "smaller")]
    mean, std = (sum(probes[0]) / 2, abs(probes[0][0] - probes[0][1]) / 2**0.5)
    tables = (work / "tables.md").read_text()
    assert (
        "Finished: 4 of 4" in tables
        and f"| 24 | {100 * mean:.1f} ± {100 * std:.1f} |" in tables
        and "| 50.0 |" in tables
    )
    assert f"{100 * (sum(probes[1]) - sum(probes[0])) / 2:+.1f} ±" in tables
    found = json.loads((work / "results.json").read_text())["cells"]["small"]["probe"]
    assert found["mean"] == pytest.approx(mean) and found["seeds"] == {"0": probes[0][0], "1": probes[0][1]}


def bare_unit(folder: Path, name: str, *commands: tuple[str, ...]) -> Any:
    places = (folder / name, folder / f"{name}.json", folder / f"{name}.txt")
    return ablation_grid.Unit(name, 0, *places, "mark", commands, {}, 1)


def test_a_lane_that_fails_or_dies_loses_its_own_unit_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs.txt")  # nobody reads it: opening it never ends
    units = [
        bare_unit(tmp_path, "good"),
        bare_unit(tmp_path, "bad", ("nonsense",)),
        bare_unit(tmp_path, "hangs"),
        bare_unit(tmp_path, "last"),
    ]
    reported: dict[str, str | None] = {}

    def kill() -> None:
        while set(reported) != {"good", "bad"}:
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    before = dict(os.environ)
    try:
        ablation_units.run_units(units, 1, lambda unit, fault: reported.__setitem__(unit.cell, fault))
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert reported["good"] is None and reported["last"] is None
    assert "nonsense" in (reported["bad"] or "") and "killed" in (reported["hangs"] or "")
    assert ablation_units.finished(units[0]) and ablation_units.finished(units[2]) is None


def test_results_made_in_another_way_are_outdated(tmp_path: Path) -> None:
    def units(**changes: Any) -> list[Any]:
        grid = ablation_grid.read_grid(write_grid(tmp_path, **changes))
        ablation_inputs.write_settings(grid, tmp_path)
        return ablation_grid.Planner(grid, tmp_path).units()

    first, same = units(), units()
    assert [unit.name for unit in first] == ["small, seed 0", "smaller, seed 0", "small, seed 1", "smaller, seed 1"]
    assert [unit.fingerprint for unit in first] == [unit.fingerprint for unit in same] and len(
        {unit.fingerprint for unit in first}
    ) == 4
    other = units(cells={"small": {"set": {"train.loss.idf": False}}, "smaller": {}})
    assert not {unit.fingerprint for unit in first} & {unit.fingerprint for unit in other[::2]}
    assert other[1].fingerprint == first[0].fingerprint  # a name decides nothing


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({"cells": {"small": {"loss": "bce"}}}, "cells.small.loss"),
        (
            {"tables": [{"title": "", "setting": "", "published": "", "rows": [{"name": "", "cell": "large"}]}]},
            "the cell 'large'",
        ),
        ({"cells": {"small": {"labels": "none"}, "smaller": {}}}, "the label set 'none'"),
    ],
)
def test_a_grid_that_does_not_hold_together(tmp_path: Path, changes: dict[str, Any], reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        ablation_grid.read_grid(write_grid(tmp_path, **changes))


def test_the_file_of_the_paper_is_sound(tmp_path: Path) -> None:
    grid = ablation_grid.read_grid(SCRIPTS / "ablations.yaml")
    ablation_inputs.write_settings(grid, tmp_path)
    planner = ablation_grid.Planner(grid, tmp_path)
    units = planner.units()
    assert len({unit.fingerprint for unit in units}) == len(units)
    asked = {row.cell for table in grid.tables for row in table.rows}
    assert asked == set(grid.cells), "a cell without a table, or the other way round"
    for name in grid.cells:
        train = planner.settings(name).train
        assert train.samples % train.batch_size == 0


def test_differences_are_of_the_same_seeds() -> None:
    assert ablation_tables.difference({0: 0.5, 1: 0.6, 2: 0.1}, {0: 0.4, 1: 0.55}) == "-7.5 ± 2.5"
    assert (
        ablation_tables.difference({0: 0.5}, {0: 0.6, 1: 0.0}) == "+10.0"
        and ablation_tables.difference({}, {0: 1.0}) == "-"
    )
