"""FFCV's own Loader, in a process of its own: when its compiled functions are freed, numba may break for all others."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def stock_process() -> Iterator[ProcessPoolExecutor]:
    """A pool of one process for `read_beton`."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def read_beton(path: Path, os_cache: bool) -> list[np.ndarray]:
    """Images, label rows and indices of a whole beton, as a stock Loader with no custom field gives them."""
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=os_cache, drop_last=False
    )
    batches = [tuple(np.array(part) for part in batch) for batch in loader]  # copies: the Loader uses its memory again
    return [np.concatenate(part) for part in zip(*batches, strict=True)]
