"""Sample order and crops: which sample comes when, and which crop of it. No function here has a state.

    Order                  (seed, position in the run) -> group, by its exact share -> window -> block -> sample, epoch
    random_crop, flipped   (seed, epoch, row of the sample among all label rows) -> the crop's box, mirrored or not

Neighbours in storage form blocks. Each epoch permutes all blocks by a key, and the samples inside a window of
consecutive blocks: a bijection per epoch in O(1) memory, from any position. It is as exact as a full shuffle (block=1),
but long stretches can be prefetched.

Why training resumes to the bit: nothing random has state. Order and crops depend on (seed, epoch, position or row),
dropout on (seed, step, rank) in `train/loop.py:_seed`. So `train/checkpoint.py` stores weights, moments and the number
of samples, no RNG state, and `train/checkpoint.py:resume_point` refuses to resume with other data or settings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from labels.native import GOLDEN, mix, njit

_ROUNDS = 6
_U = np.uint64
_BLOCKS, _WINDOW, _ROTATION, _PERIOD = 1, 2, 3, 4  # what a key is for


@njit(inline="always")
def _key(seed: int, use: int, first: int, second: int) -> np.uint64:
    key = mix(_U(seed) * _U(0xD1342543DE82EF95) + _U(use))
    return mix(mix(key ^ _U(first) * GOLDEN) + _U(second) * _U(0xA24BAED4963EE407))


@njit
def permute(value: int, count: int, key: np.uint64) -> int:
    """A keyed bijection of [0, count): a Feistel network over the next power of two, repeated until inside."""
    bits = 0
    while (count - 1) >> bits:
        bits += 1
    low_bits = _U((bits + 1) // 2)
    high_bits = _U(bits) - low_bits
    low, high = (_U(1) << low_bits) - _U(1), (_U(1) << high_bits) - _U(1)
    result = _U(value)
    while True:
        left, right = result >> low_bits, result & low
        for number in range(0, _ROUNDS, 2):
            # Each half changes by a function of the other alone: invertible, also for halves of unequal width.
            left ^= mix(right + key + _U(number) * GOLDEN) & high
            right ^= mix(left + key + _U(number + 1) * GOLDEN) & low
        result = (left << low_bits) | right
        if result < _U(count):
            return np.int64(result)  # pyright: ignore[reportReturnType]


@njit
def _sample(position: int, epoch: int, count: int, block: int, window: int, seed: int, group: int) -> int:
    """The sample at a position of an epoch of one group, both in [0, count)."""
    blocks = (count + block - 1) // block
    windows = max(1, blocks // window)
    block_key, rotation = _key(seed, _BLOCKS, epoch, group), _key(seed, _ROTATION, epoch, group)
    while True:
        # Windows of nearly equal size: none is a small rest whose samples would come unmixed.
        number = ((position // block + 1) * windows - 1) // blocks
        begin, end = number * blocks // windows, (number + 1) * blocks // windows
        inside = permute(
            position - begin * block, (end - begin) * block, _key(seed, _WINDOW, epoch * 64 + group, number)
        )
        position = permute(begin + inside // block, blocks, block_key) * block + inside % block
        if position < count:  # beyond it: the last block is not full; permute again
            # The rotation moves the borders of blocks in every epoch.
            return (position + np.int64(rotation % _U(count))) % count  # pyright: ignore[reportReturnType]


@njit(nogil=True, cache=True)
def _fill(  # noqa: ANN202
    begin: int, sizes: ndarray, quotas: ndarray, block: int, window: int, seed: int, samples: ndarray, epochs: ndarray
):
    """Samples and epochs of the positions begin, begin + 1, ...; `quotas` int64 [groups + 1] are running sums."""
    period = quotas[-1]
    for row in range(len(samples)):
        turn, slot = (begin + row) // period, (begin + row) % period
        group, first = 0, 0
        if len(sizes) > 1:
            slot = permute(slot, period, _key(seed, _PERIOD, turn, 0))
            while slot >= quotas[group + 1]:
                first += sizes[group]
                group += 1
        seen = turn * (quotas[group + 1] - quotas[group]) + slot - quotas[group]
        epochs[row] = seen // sizes[group]
        samples[row] = first + _sample(seen % sizes[group], epochs[row], sizes[group], block, window, seed, group)


@njit(nogil=True, cache=True)
def _block_starts(begin: int, end: int, size: int, block: int, seed: int, group: int) -> ndarray:
    """First samples of the blocks at the positions [begin, end) of one group."""
    starts = np.empty(max(0, (end - begin) // block + 2), np.int64)
    count, blocks = 0, (size + block - 1) // block
    while begin < end and count < len(starts):
        epoch, position = begin // size, begin % size
        rotation = np.int64(_key(seed, _ROTATION, epoch, group) % _U(size))
        first = permute(position // block, blocks, _key(seed, _BLOCKS, epoch, group)) * block
        starts[count] = (first + rotation) % size
        count += 1
        begin = min(begin - position % block + block, (epoch + 1) * size)
    return starts[:count]


@dataclass(frozen=True)
class Order:
    """The order of a whole run. Positions count from the run's first sample, sample numbers through the groups."""

    sizes: Sequence[int]  # samples of each group
    quotas: Sequence[int] = (1,)  # positions of each group in a period of sum(quotas), exactly
    block: int = 1  # neighbouring samples that stay together until the window; 1 shuffles fully
    window: int = 1  # blocks whose samples are mixed
    seed: int = 0

    def take(self, begin: int, count: int) -> tuple[ndarray, ndarray]:
        """Sample numbers and epochs, both int64 [count], of the positions from `begin` on."""
        samples, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        seed = self.seed % 2**63
        _fill(begin, np.array(self.sizes, np.int64), self._bounds, self.block, self.window, seed, samples, epochs)
        return samples, epochs

    def batch(self, step: int, batch_size: int, rank: int, world: int) -> tuple[ndarray, ndarray]:
        """Sample numbers and epochs of one rank in one step; a batch may span epochs.

        `batch_size` counts all ranks and is a multiple of `world`; both results are int64 [batch_size / world].
        """
        share = batch_size // world
        return self.take(step * batch_size + rank * share, share)

    def readahead(self, begin: int, end: int, *, first: bool = False) -> list[tuple[int, int]]:
        """Blocks to read ahead, as (first sample, samples): those needed one window after the positions [begin, end).

        Consecutive ranges give every block once; the last block of an epoch may reach into its first. With `first`,
        for the beginning of a run, also the blocks needed until then.
        """
        stretches: list[tuple[int, int]] = []
        start, period = 0, int(self._bounds[-1])
        for group, (size, quota) in enumerate(zip(self.sizes, np.diff(self._bounds).tolist(), strict=True)):
            blocks = -(-size // self.block)
            lead = -(-blocks // max(1, blocks // self.window)) * self.block  # samples in the longest window
            # In whole periods: within one, any group may come first.
            low, high = (-(-position // period) * quota for position in (begin, end))
            low = begin // period * quota // self.block * self.block if first else self._block_border(low + lead, size)
            high = self._block_border(high + lead, size)
            starts = _block_starts(low, high, size, self.block, self.seed % 2**63, group)
            for sample in starts.tolist():
                count = min(self.block, size)
                over = max(0, sample + count - size)  # a block may wrap around the end
                stretches += [(start + sample, count - over), (start, over)] if over else [(start + sample, count)]
            start += size
        return stretches

    def _block_border(self, position: int, size: int) -> int:
        """The first position from `position` on at which a block begins; every epoch begins with one."""
        epoch, in_epoch = divmod(position, size)
        return min(epoch * size + -(-in_epoch // self.block) * self.block, (epoch + 1) * size)

    @property
    def _bounds(self) -> ndarray:
        return np.concatenate([[0], np.cumsum(self.quotas)]).astype(np.int64)


# -- crops: counter-based draws. Draws 0 to 39 are the crop's, 40 the flip's, later ones those of train/data/inputs.py.


@njit(inline="always")
def uniform(seed: int, epoch: int, index: int, draw: int) -> float:
    """Draw number `draw` of the sample with row `index`: float64 in [0, 1)."""
    key = mix(_U(seed) + GOLDEN)
    key = mix(key ^ (_U(epoch) * _U(0xD1342543DE82EF95) + _U(1)))
    key = mix(key ^ (_U(index) * _U(0xA24BAED4963EE407) + _U(2)))
    key = mix(key + _U(draw) * GOLDEN)
    return np.float64(key >> _U(11)) / 9007199254740992.0


@njit
def random_crop(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], seed: int, epoch: int, index: int
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (left, top, width, height): torchvision's ten tries of area and aspect, then the centre.

    `scale` is the range of the area's share, `ratio` of width / height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * uniform(seed, epoch, index, 4 * attempt))
        aspect = math.exp(low + (high - low) * uniform(seed, epoch, index, 4 * attempt + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(uniform(seed, epoch, index, 4 * attempt + 2) * (width - w + 1))
            top = int(uniform(seed, epoch, index, 4 * attempt + 3) * (height - h + 1))
            return left, top, w, h
    if width < ratio[0] * height:
        w, h = width, min(height, round(width / ratio[0]))
    elif width > ratio[1] * height:
        w, h = min(width, round(height * ratio[1])), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@njit
def flipped(seed: int, epoch: int, index: int) -> bool:
    """Whether a sample is mirrored in this epoch: half of all are."""
    return uniform(seed, epoch, index, 40) < 0.5
