"""Worker processes of this machine: forked from one server process that has imported and compiled everything once.

The server is started early, so that it gets ready on another core while the main process still looks at its input. It is a process of
its own, because a fork of the main process would take along the locks of its threads.
"""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_any

_READY = "preprocess.ready"


def start_server() -> bool:
    """Start the server unless it runs already; False if it cannot be: where temporary files have too long a path for a socket."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([_READY])
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
    """In a worker: end as soon as the parent does, also when it is killed, so that no orphan writes beside the next run.

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
