"""Progress with rate and ETA: a live bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_LINE_SECONDS = 5.0


class Meter:
    """Counts shards (or betons) and samples of one stage, on standard error."""

    def __init__(self, stage: str, shards: int, done: int = 0) -> None:
        self._stage, self._shards, self._done, self._skipped = stage, shards, done, done
        self._samples = 0
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(stage, total=shards, completed=done, rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def advance(self, samples: int, shards: int = 1) -> None:
        """So many samples more, of so many shards."""
        self._done += shards
        self._samples += samples
        if self._bar:
            self._bar.update(self._task, advance=shards, rate=f"{self._rate():,.0f} samples/s")
        elif time.monotonic() - self._last >= _PLAIN_LINE_SECONDS:
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
