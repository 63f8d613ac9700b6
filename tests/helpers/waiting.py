"""What several tests share: waiting."""

import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path


def steps_done(run: Path) -> int:
    """How far a run that goes on beside this test has written its losses; a line may be cut."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.is_file() else 0


def wait_until(process: ForkServerProcess, run: Path, step: int) -> None:
    while process.is_alive() and steps_done(run) < step:
        time.sleep(0.002)
    assert process.is_alive(), f"the run ended before step {step}"
