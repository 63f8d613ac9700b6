"""What all fuzz runs share: inputs from a seed and a number, a limit of seconds, the failing one kept, the counts."""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

SECONDS = 20
Input = TypeVar("Input")


@contextmanager
def within_seconds() -> Iterator[None]:
    """Fail if the block takes longer than any input may."""

    def end(*_: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_all(
    inputs: int,
    seed: int,
    make: Callable[[random.Random], Input],
    check: Callable[[Input, int], Counter[str]],
    kept: Callable[[Input], tuple[str, bytes]],
) -> Counter[str]:
    """The sum of `check(input, number)` over all inputs. A failing one is written: `kept` gives its name and data."""
    total: Counter[str] = Counter()
    for number in range(inputs):
        made = make(random.Random(f"{seed}-{number}"))
        try:
            with within_seconds():
                total += check(made, number)
        except BaseException:
            name, data = kept(made)
            Path(name).write_bytes(data)
            print(f"input {number} of seed {seed}: see {name}", file=sys.stderr)
            raise
        if number % 10_000 == 9_999:
            print(f"{number + 1:,} inputs", flush=True)
    return total


def main(
    description: str | None, verdict: str, fuzz: Callable[[argparse.Namespace, Path], Counter[str]], **options: int
) -> None:
    """The command line --inputs, --seed and `options` with their defaults: run in memory, print the counts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in ({"inputs": 25_000, "seed": 0} | options).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    start, memory = time.monotonic(), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        total = fuzz(arguments, Path(folder))
    seconds = time.monotonic() - start
    print(f"{arguments.inputs:,} inputs, {total.total():,} outcomes in {seconds:,.0f} s: {verdict}")
    for outcome, count in total.most_common():
        print(f"{count:9,}  {outcome}")
