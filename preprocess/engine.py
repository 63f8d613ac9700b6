"""Run one function over many tasks, in worker processes of this machine or on a Ray cluster; results in any order, and
progress.

A worker that dies ends a local run with the likely reason; on Ray its task is given to another worker (ray_engine.py).
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from labels.storage import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

# ---- workers: Worker processes of this machine: forked from one server process that has imported and compiled
# everything once.
#
# The server is started early, so that it gets ready on another core while the main process still looks at its input. It
# is a process of its own, because a fork of the main process would take along the locks of its threads.


_PRELOAD = "preprocess.preload"


def start_server() -> bool:
    """Start the server unless it runs already; False if it cannot be: where temporary files have too long a path for a
    socket.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOAD])
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"  # a module of the current folder is not to stand in for an installed one
    try:
        forkserver.ensure_running()
    except OSError:
        return False
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before
    return True


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of `workers` processes, one for every core it may use."""
    method = "forkserver" if start_server() else "spawn"
    context = multiprocessing.get_context(method)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(dict(os.environ),))


def one_core() -> None:
    """In a worker: no threads of libraries beside its own, since there is a worker for every core.

    Arrow's own allocators give memory back and fault it in again with every batch; the system's keeps it.
    """
    import pyarrow as pa  # not above: the main process starts the server before it imports anything large

    pa.set_cpu_count(1)
    pa.set_memory_pool(pa.system_memory_pool())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _begin_worker(environment: dict[str, str]) -> None:
    """In a worker: end as soon as the parent does, also when it is killed, so that no orphan writes beside the next
    run.

    Args:
        environment: the parent's; the server has that of the moment at which it was started.
    """
    os.environ.clear()
    os.environ.update(environment)
    one_core()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_any([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_PLAIN_LINE_S = 5.0
Engine = Literal["local", "ray"]
Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_count(requested: int) -> int:
    """`requested`, or for 0 the number of cores this process may use."""
    return requested or len(os.sched_getaffinity(0))


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    engine: Engine = "local",
    shared: Path | None = None,
) -> Iterator[Result]:
    """Yield `function(task)` for every task as each ends.

    Args:
        function: importable by name; what it raises is raised again by this generator, after the waiting tasks were
            cancelled.
        tasks: picklable; on Ray a task may run again after its node was lost, also while the lost one still runs.
        workers: processes; 1 runs in this process. A Ray cluster that runs already is used with all its CPUs instead.
        engine: `local`: processes of this machine; `ray`: a Ray cluster.
        shared: a file of the output folder that every machine has to see with the same content; None for an object
            store.

    Raises:
        UserError: a worker process died, with what usually kills one; a node of the cluster lacks something.
    """
    if not tasks:
        return
    if engine == "ray":
        from preprocess.ray import run_on_ray  # LAZY: an extra

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
                "a worker process exited unexpectedly; finished shards are kept",
                fix="look for the out-of-memory killer in `dmesg`, take fewer --workers, and run the same command again",
            ) from None
        finally:
            for future in running:
                future.cancel()


class Meter:
    """Progress of one stage on standard error: a live bar on a terminal, elsewhere a plain line every few seconds.

    Args:
        stage: its name.
        shards: how many shards, or betons, it has.
        done: how many of them are finished already.
    """

    def __init__(self, stage: str, shards: int, done: int = 0) -> None:
        self._stage, self._shards, self._done, self._skipped = stage, shards, done, done
        self._samples = 0
        self._start = self._last = time.monotonic()
        self._bar = _live_bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(stage, total=shards, completed=done, rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, samples: int, shards: int = 1) -> None:
        """Count more samples, and the shards that hold them."""
        self._done += shards
        self._samples += samples
        if self._bar:
            self._bar.update(self._task, advance=shards, rate=f"{self._rate():,.0f} samples/s")
        elif time.monotonic() - self._last >= _PLAIN_LINE_S:
            self._line()

    def _rate(self) -> float:
        return self._samples / max(time.monotonic() - self._start, 1e-9)

    def _line(self) -> None:
        self._last = time.monotonic()
        worked = self._done - self._skipped
        left = (self._shards - self._done) * (self._last - self._start) / worked if worked else 0.0
        print(
            f"{self._stage}: {self._done}/{self._shards} shards, {self._samples:,} samples, "
            f"{self._rate():,.0f} samples/s, ETA {left:,.0f} s",
            file=sys.stderr,
            flush=True,
        )


def _live_bar() -> "Progress":
    from rich.console import Console  # LAZY: worker processes import this module and print nothing
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
