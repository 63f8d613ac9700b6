"""Runs units in persistent processes, so that libraries are imported once; each unit writes a result JSON at its end.

units -> lanes (a process each, one thread of torch) -> run_unit: the commands of `train`, in that process
-> WORK/cells/<cell>-seed<n>.json
"""

import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from ablation_grid import Unit
from clipart_progress import exit_with_parent
from labels.storage import write_json

# For these small models, two processes with one thread are faster than one process with two threads.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_DIED = "its process was killed (out of memory?)"


def finished(unit: Unit) -> dict[str, Any] | None:
    """The unit's result, if it exists with the same fingerprint."""
    try:
        result = json.loads(unit.file.read_text(encoding="utf8"))
    except (FileNotFoundError, ValueError):
        return None
    return result if result.get("fingerprint") == unit.fingerprint else None


def run_units(units: Sequence[Unit], jobs: int, report: Callable[[Unit, str | None], None]) -> None:
    """Run all units, `jobs` at once; a unit that fails does not stop the others.

    Args:
        report: called after each unit with its error, or None.
    """
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # libraries read these when a worker process loads them
    waiting, idle = deque(units), [_lane() for _ in range(min(jobs, len(units)))]
    running: dict[Future[str | None], tuple[Unit, ProcessPoolExecutor]] = {}
    while waiting or running:
        while waiting and idle:
            unit, lane = waiting.popleft(), idle.pop()
            running[lane.submit(run_unit, unit)] = (unit, lane)
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            unit, lane = running.pop(future)
            try:
                fault = future.result()
            except BrokenProcessPool:
                fault, lane = _DIED, _lane()
            idle.append(lane)
            report(unit, fault)
    for lane in idle:
        lane.shutdown()


def _lane() -> ProcessPoolExecutor:
    """One worker process: if it is killed, only its unit is lost."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=exit_with_parent)


def run_unit(unit: Unit) -> str | None:
    """Train and evaluate, with output to the unit's log. An interrupted training resumes from its last checkpoint.

    Returns:
        The error in one line, or None.
    """
    unit.log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with unit.log.open("a", encoding="utf8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            for command in unit.commands:
                _train(command)
            write_json(unit.file, _result(unit, time.monotonic() - began))
        except BaseException as error:  # SystemExit too: commands exit with it on SIGTERM
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for folder in ("checkpoints", "lit/checkpoints", "features"):  # 120 MB that are no longer needed
        shutil.rmtree(unit.run / folder, ignore_errors=True)
    return None


def _train(words: Sequence[str]) -> None:
    """`train WORDS`, in this process."""
    from train.cli import cli  # importing torch takes seconds: only in worker processes

    print(f"\n== train {' '.join(words)}", flush=True)
    cli.main(list(words), prog_name="train", standalone_mode=False)


def _result(unit: Unit, seconds: float) -> dict[str, Any]:
    """The unit's JSON: accuracies of the encoder and of the majority class, as fractions of 1."""
    metrics: dict[str, float] = {}
    for protocol, file in unit.results.items():
        rows = json.loads(file.read_text(encoding="utf8"))["results"]
        metrics["majority"], metrics[protocol] = rows[0]["top1"], rows[1]["top1"]
    return {
        "cell": unit.cell,
        "seed": unit.seed,
        "fingerprint": unit.fingerprint,
        "commands": [list(command) for command in unit.commands],
        "metrics": metrics,
        "seconds": round(seconds, 1),
    }
