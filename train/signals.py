"""SIGTERM and SIGUSR1 ask a run to save and leave: schedulers send them before they take a machine away."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPED_EXIT_CODE = 75
"""A run that was asked to stop, saved and left: start it again to go on (EX_TEMPFAIL of sysexits.h)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether one of the signals has come; the old handlers are put back at the end."""
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """Somebody asked to stop in the midst of this, and it has been saved: the same command goes on."""
