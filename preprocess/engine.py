"""Run one function over many shards in worker processes; results in any order, a dead worker ends the run with its reason."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from typing import TypeVar

from labels.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_count(wanted: int) -> int:
    """`wanted`, or for 0 the number of cores this process may use."""
    return wanted or len(os.sched_getaffinity(0))


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield `function(task)` for every task as each ends.

    Args:
        function: importable by name; what it raises is raised here, after the running tasks were let go.
        tasks: picklable.
        workers: processes; 1 runs in this process.

    Raises:
        UserError: a worker process died, naming what usually kills one.
    """
    if workers == 1 or len(tasks) <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_end_with_parent) as pool:
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


def _end_with_parent() -> None:
    """In a worker: end as soon as the parent does, also when it is killed, so that no orphan writes beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_any([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
