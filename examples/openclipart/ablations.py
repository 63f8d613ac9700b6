"""The paper's ablations on the demo's data: every cell of a file with every seed, tables with means and standard
deviations, plots.

DATA/{train,test} -> WORK/labels, evaluation (ablation_inputs.py) -> WORK/cells/<cell>-seed<n>.json (ablation_units.py)
                  -> WORK/results.json, tables.md, *.png (ablation_tables.py)

Run: make ablations, or python examples/openclipart/ablations.py --data demo/data --out demo/ablations. Resumable.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ablation_grid import Planner, Unit, read_grid
from ablation_inputs import make_evaluation_set, make_labels, write_settings
from ablation_tables import draw_plots, write_tables
from ablation_units import finished, run_units
from labels.storage import UserError

_HERE = Path(__file__).parent


class Reporter:
    """Prints a line after each unit, with an ETA from the costs of the units."""

    def __init__(self, planner: Planner, units: Sequence[Unit], missing: Sequence[Unit]) -> None:
        self._planner, self._units = planner, units
        self._start, self._cost = time.monotonic(), sum(unit.cost for unit in missing)
        self._done_cost, self._done, self.faults = 0, len(units) - len(missing), dict[str, str]()

    def __call__(self, unit: Unit, fault: str | None) -> None:
        self._done_cost += unit.cost
        self._done += 1
        left = (time.monotonic() - self._start) * (self._cost - self._done_cost) / self._done_cost
        if fault is not None:
            self.faults[unit.name] = f"{fault}; see {unit.log}"
        result = finished(unit)
        what = (
            ", ".join(f"{name} {value:.1%}" for name, value in result["metrics"].items() if name != "majority")
            if result
            else "failed"
        )
        seconds = f", {result['seconds']:.0f} s" if result else ""
        print(f"[{self._done}/{len(self._units)}] {unit.name}: {what}{seconds}; ETA {left / 60:.0f} min", flush=True)
        write_tables(self._planner.grid, self._planner, self._units)


def run(file: Path, data: Path, work: Path, jobs: int) -> int:
    """Run all missing units. Returns the exit status: 1 if a unit failed.

    Raises:
        UserError: an error that affects all cells.
    """
    grid = read_grid(file)
    write_settings(grid, work)
    planner = Planner(grid, work)
    units = planner.units()
    missing = [unit for unit in units if finished(unit) is None]
    reporter = Reporter(planner, units, missing)
    if missing:
        make_evaluation_set(grid.evaluation, data, work / "evaluation")
        missing = _labelled(planner, missing, data, reporter)
        run_units(missing, jobs, reporter)
    write_tables(grid, planner, units)
    plots = draw_plots(grid, planner, units)
    print(f"tables: {work / 'tables.md'}; plots: {', '.join(map(str, plots)) or 'none'}")
    for name, fault in reporter.faults.items():
        print(f"failed: {name}: {fault}", file=sys.stderr)
    return 1 if reporter.faults else 0


def _labelled(planner: Planner, missing: Sequence[Unit], data: Path, reporter: Reporter) -> list[Unit]:
    """Makes the label sets of the missing units; returns the units whose labels exist."""
    grid, without = planner.grid, set[str]()
    needed = {unit.cell: grid.cells[unit.cell].labels or grid.first_labels for unit in missing}
    for name in dict.fromkeys([grid.first_labels, *needed.values()]):
        try:
            make_labels(grid, name, data, planner.work)
        except UserError as error:
            if name == grid.first_labels:
                raise
            without.add(name)
            reporter.faults[f"label set {name}"] = str(error)
    return [unit for unit in missing if needed[unit.cell] not in without]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="The paper's ablations on the demo's data. Resumable: run the same command again."
    )
    parser.add_argument(
        "--grid",
        type=Path,
        default=_HERE / "ablations.yaml",
        help="cells, seeds, tables (default: ablations.yaml next to this file)",
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train/ and test/, as make_shards.py writes it"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="cells at once, a core each (default: cores)"
    )
    chosen = parser.parse_args(arguments)
    try:
        return run(chosen.grid, chosen.data, chosen.out, max(chosen.jobs, 1))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
