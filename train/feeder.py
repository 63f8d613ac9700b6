"""Which samples a step is trained on, where a data set is small enough to be shuffled whole."""

from collections.abc import Iterator

import numpy as np


def rows_of_steps(count: int, size: int, seed: int, first_step: int, steps: int) -> Iterator[np.ndarray]:
    """The rows, int64 [size], of each step's batch: one permutation of [0, count) after the other, without a gap."""
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(first_step, steps):
        positions, rows = np.arange(step * size, (step + 1) * size), np.empty(size, np.int64)
        for number in range(positions[0] // count, positions[-1] // count + 1):
            if number != epoch:
                epoch, order = number, np.random.default_rng([seed, number]).permutation(count)
            in_epoch = positions // count == number
            rows[in_epoch] = order[positions[in_epoch] % count]
        yield rows
