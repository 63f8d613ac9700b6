"""Run one function over many tasks, in worker processes of this machine or on a Ray cluster; results in any order.

    tasks -> run_tasks -> ProcessPoolExecutor, or ray.py -> results -> Meter: progress on standard error

Workers are forked from one server process that has imported and compiled everything once. The server starts early, so
that it gets ready on another core while the main process still reads its input. It is a process of its own, because a
fork of the main process would inherit the locks of the main process's threads. A worker that dies ends a local run
with the likely reason; Ray gives its task to another worker.
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

from labels.show.terminal import count
from labels.storage import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

# The server imports the work of most builds, and with it this module, which then runs `_warm_up` (last line).
_PRELOAD = ["preprocess.shard"]
# In the server alone. The safe path: a module of the current folder must not replace an installed one.
_SERVER_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "SUPERCLASS_LEAN_WARM_UP": "1"}
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
    """Yield `function(task)` for every task as each ends. An error of a task cancels the waiting tasks.

    Args:
        function: importable by name.
        tasks: picklable; on Ray a task may run again after its node was lost, also while the lost one still runs.
        workers: processes; 1 runs in this process. A Ray cluster that runs already is used with all its CPUs instead.
        engine: worker processes of this machine, or a Ray cluster.
        shared: a file of the output folder that every machine must see with the same content; None: an object store.

    Raises:
        UserError: a worker process exited unexpectedly; a node of the cluster lacks something.
    """
    if not tasks:
        return
    if engine == "ray":
        from preprocess.ray import run_on_ray  # LAZY: an extra

        yield from run_on_ray(function, tasks, workers, shared, one_core)
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
                fix="look for the out-of-memory killer in `dmesg`, use fewer --workers, and run the same command again",
            ) from None
        finally:
            for future in running:
                future.cancel()


def start_server() -> bool:
    """Start the server unless it runs; False if the path of temporary files is too long for its socket."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    before = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
    os.environ.update(_SERVER_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    except OSError:
        return False
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return True


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of processes, with one core each."""
    context = multiprocessing.get_context("forkserver" if start_server() else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(dict(os.environ),))


def one_core() -> None:
    """In a worker: no threads of libraries, since there is a worker for every core.

    Arrow's own allocators give memory back and fault it in again with every batch; the system's keeps it.
    """
    import pyarrow as pa  # LAZY: the main process starts the server before it imports anything large

    pa.set_cpu_count(1)
    pa.set_memory_pool(pa.system_memory_pool())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _begin_worker(environment: dict[str, str]) -> None:
    """Take the parent's environment, not the server's; end with the parent: no orphan may write during the next run."""
    os.environ.clear()
    os.environ.update(environment)
    one_core()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_any([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _warm_up() -> None:
    """In the server: load the compiled code, which takes a second, with CLIP's tokenizer, which most builds use."""
    from labels.settings import Labels
    from labels.tokenizers.tokenizer import make_tokenizer

    one_core()
    make_tokenizer(Labels()).encode_rows(["a caption"], 1)


class Meter:
    """Progress of one stage on standard error: a live bar on a terminal, elsewhere a plain line every few seconds.

    `shards`: shards or betons of the stage; `done`: those that are finished already.
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
            f"{self._stage}: {self._done}/{count(self._shards, 'shard')}, {count(self._samples, 'sample')}, "
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


if os.environ.get("SUPERCLASS_LEAN_WARM_UP"):
    _warm_up()
