"""Reads ahead of the loader: blocks are asked for a whole window before their samples come, so that disks read in long stretches.

On one machine only: of many, each would read all blocks for its part of their samples.
"""

import os
from collections import deque
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import numpy as np

from train.data.dataset import BetonSet
from train.data.image_index import TABLE_BYTES, advise
from train.data.order import Order
from train.threads import Threads

_MOST_WAITING = 64


class Ahead:
    """One thread beside the decoding ones; use it in a `with` block.

    Args:
        betons: the set.
        order: of its samples.
        rank, world: this process among all; the ranks of one machine share the work.
    """

    def __init__(self, betons: BetonSet, order: Order, rank: int, world: int) -> None:
        self._betons, self._order = betons, order
        self._one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)) >= world
        self._rank, self._world = rank, world
        self._pool = Threads(1, "ahead")
        self._waiting: deque[Future[None]] = deque()
        self._scratch = np.empty(TABLE_BYTES, np.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, trace)

    def follow(self, begin: int, end: int, *, first: bool) -> None:
        """The loader now takes the positions [begin, end): read what comes a window later; `first`, what comes until then too.

        Raises:
            UserError: a file is gone, cut, or cannot be fetched.
        """
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._read, begin, end, first))

    def _read(self, begin: int, end: int, first: bool) -> None:
        blocks = self._order.ahead(begin, end, first=first)
        if not blocks:
            return
        self._betons.bring(self._betons.numbers(self._samples(blocks)))
        own = blocks[self._rank :: self._world]
        if self._one_machine and own:
            advise(self._betons.tables, self._samples(own), self._betons.label_limit, self._scratch)

    def _samples(self, blocks: list[tuple[int, int]]) -> np.ndarray:
        return self._betons.chosen(np.concatenate([np.arange(first, first + count) for first, count in blocks]))
