"""Maps a function over items in worker processes and shows how far it is, with the rate.

On a terminal the line is rewritten; in a log file a new line is written every few seconds.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TERMINAL_SECONDS = 0.2
LOG_SECONDS = 5.0
# Items handed to a worker at once: few enough for an even load, many enough that messages cost nothing.
CHUNK = 8


class Progress:
    """A progress line on standard error."""

    def __init__(self, label: str, total: int) -> None:
        """Starts the clock."""
        self.label = label
        self.total = total
        self.done = 0
        self.start = time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.next_line = self.start + self.interval

    @property
    def interval(self) -> float:
        """Seconds between two lines."""
        return TERMINAL_SECONDS if self.is_terminal else LOG_SECONDS

    def advance(self) -> None:
        """Counts one item; prints when a line is due, and always for the last item."""
        self.done += 1
        now = time.monotonic()
        if now >= self.next_line or self.done == self.total:
            self.next_line = now + self.interval
            rate = self.done / max(now - self.start, 1e-9)
            end = "\n" if self.done == self.total or not self.is_terminal else ""
            begin = "\r" if self.is_terminal else ""
            line = f"{begin}{self.label}: {self.done:,} of {self.total:,}, {rate:,.0f}/s"
            print(line, end=end, file=sys.stderr, flush=True)


def exit_with_parent() -> None:
    """Makes a worker end when its parent is killed; it would wait for work for ever otherwise."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def map_with_progress(
    label: str, function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[Result]:
    """The results in the order of the items, whatever the number of workers."""
    progress = Progress(label, len(items))
    if workers == 1:
        for item in items:
            yield function(item)
            progress.advance()
        return
    # "spawn" rather than "fork": pyarrow starts threads in this process, and those do not survive a fork. An
    # executor rather than a Pool: it raises when a worker is killed, where a Pool waits for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=exit_with_parent) as executor:
        for result in executor.map(function, items, chunksize=CHUNK):
            yield result
            progress.advance()
