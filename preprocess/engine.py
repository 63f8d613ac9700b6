"""Run one function over many shards, in worker processes here or on a Ray cluster; results in any order.

A dead worker ends a local run with its reason; on Ray its task is given to another (ray_engine.py).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal, TypeVar

from labels.errors import UserError
from preprocess.workers import worker_pool

Engine = Literal["local", "ray"]
Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_count(wanted: int) -> int:
    """`wanted`, or for 0 the number of cores this process may use."""
    return wanted or len(os.sched_getaffinity(0))


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, engine: Engine = "local", shared: Path | None = None
) -> Iterator[Result]:
    """Yield `function(task)` for every task as each ends.

    Args:
        function: importable by name; what it raises is raised here, after the running tasks were let go.
        tasks: picklable; on Ray one may be run again after its node was lost, also while the lost one still runs.
        workers: processes; 1 runs in this process. On a Ray cluster that is there already, its size counts instead.
        engine: `local`: processes of this machine; `ray`: a Ray cluster.
        shared: a file of OUT that every machine has to see as it is here; None if the tasks write to an object store.

    Raises:
        UserError: a worker process died, naming what usually kills one; a node of the cluster lacks something.
    """
    if not tasks:
        return
    if engine == "ray":
        from preprocess.ray_engine import run_on_ray  # an extra: only who asks for it needs it

        yield from run_on_ray(function, tasks, workers, shared)
        return
    if workers == 1 or len(tasks) == 1:
        yield from map(function, tasks)
        return
    with worker_pool(min(workers, len(tasks))) as pool:
        waiting = iter(tasks)
        running: set[Future[Result]] = set()
        try:
            for task in waiting:
                running.add(pool.submit(function, task))
                if len(running) < 2 * workers:
                    continue
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool:
            raise UserError(
                "a worker process died without a word; finished shards are kept",
                mend="look for the out-of-memory killer in `dmesg`, take fewer --workers, and run the same command again",
            ) from None
        finally:
            for future in running:
                future.cancel()
