"""In which order samples are seen: a pure function of (seed, epoch, position), in O(1) memory, from any position.

    position -> group (mixtures: its exact share of every period) -> place in the window -> block -> sample

Neighbours in storage form blocks. Each epoch is a keyed permutation of all blocks; a window of consecutive blocks of
that order is permuted sample by sample. So disks read blocks, pages are used while they are warm, and every sample
comes exactly once an epoch, whatever the batch size, the number of ranks, or where the run was interrupted. Blocks of
one sample: a full shuffle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labels.native import GOLDEN, mix, njit

_ROUNDS = 6
_U = np.uint64
_BLOCKS, _WINDOW, _TURN, _PERIOD = 1, 2, 3, 4  # what a key is for


@njit(inline="always")
def _key(seed: int, use: int, first: int, second: int) -> np.uint64:
    key = mix(_U(seed) * _U(0xD1342543DE82EF95) + _U(use))
    return mix(mix(key ^ _U(first) * GOLDEN) + _U(second) * _U(0xA24BAED4963EE407))


@njit
def permute(value: int, count: int, key: np.uint64) -> int:
    """A keyed bijection of [0, count): a Feistel network over the next power of two, walked along its cycle until
    inside.
    """
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
            # Each half is changed by a function of the other alone, which can be undone: a bijection, for halves of
            # unequal width too.
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
    block_key, turn = _key(seed, _BLOCKS, epoch, group), _key(seed, _TURN, epoch, group)
    at = position
    while True:
        # Windows of nearly equal size: none is a small rest whose samples would come unmixed.
        number = ((at // block + 1) * windows - 1) // blocks
        begin, end = number * blocks // windows, (number + 1) * blocks // windows
        inside = permute(at - begin * block, (end - begin) * block, _key(seed, _WINDOW, epoch * 64 + group, number))
        at = permute(begin + inside // block, blocks, block_key) * block + inside % block
        if at < count:  # the last block may be larger than what is left for it: walk on along the cycle
            # Blocks begin elsewhere in every epoch, so that neighbours part.
            return (at + np.int64(turn % _U(count))) % count  # pyright: ignore[reportReturnType]


@njit(nogil=True, cache=True)
def _fill(  # noqa: ANN202
    begin: int,
    sizes: np.ndarray,
    quotas: np.ndarray,
    block: int,
    window: int,
    seed: int,
    samples: np.ndarray,
    epochs: np.ndarray,
):
    """Samples and epochs of the positions begin, begin + 1, ...; `quotas` int64 [groups + 1] are running sums of shares
    of a period.
    """
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
def _block_starts(begin: int, end: int, size: int, block: int, seed: int, group: int) -> np.ndarray:
    """First samples of the blocks whose turn comes at the positions [begin, end) of one group."""
    starts = np.empty(max(0, (end - begin) // block + 2), np.int64)
    found, blocks = 0, (size + block - 1) // block
    at = begin
    while at < end:
        epoch, position = at // size, at % size
        turn = np.int64(_key(seed, _TURN, epoch, group) % _U(size))
        starts[found] = (permute(position // block, blocks, _key(seed, _BLOCKS, epoch, group)) * block + turn) % size
        found += 1
        at = min(at - position % block + block, (epoch + 1) * size)
        if found == len(starts):
            break
    return starts[:found]


@dataclass(frozen=True)
class Order:
    """The order of a whole run.

    Attributes:
        sizes: samples of each group; sample numbers count through the groups.
        quotas: how many of each period of `sum(quotas)` positions are each group's, exactly. One group: any.
        block: neighbouring samples that stay together until the window; 1 shuffles fully.
        window: blocks whose samples are mixed.
        seed: any non-negative integer.
    """

    sizes: Sequence[int]
    quotas: Sequence[int] = (1,)
    block: int = 1
    window: int = 1
    seed: int = 0

    def take(self, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers and epochs, both int64 [count], of the positions from `begin` on, counted from the run's first
        sample.
        """
        samples, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        seed = self.seed % 2**63
        _fill(begin, np.array(self.sizes, np.int64), self._running, self.block, self.window, seed, samples, epochs)
        return samples, epochs

    def batch(self, step: int, batch_size: int, rank: int, world: int) -> tuple[np.ndarray, np.ndarray]:
        """What one rank sees in one step; a batch may span epochs.

        Args:
            step: from 0.
            batch_size: over all ranks; a multiple of `world`.
            rank, world: this rank and how many there are.

        Returns:
            sample numbers int64 [batch_size / world] and their epochs int64 of the same shape.
        """
        share = batch_size // world
        return self.take(step * batch_size + rank * share, share)

    def ahead(self, begin: int, end: int, *, first: bool = False) -> list[tuple[int, int]]:
        """What to read ahead: (first sample, samples) of the blocks that are needed a window after the positions
        [begin, end).

        Asked for with consecutive ranges, it names every block once; the last block of an epoch may reach into its
        first.

        Args:
            begin, end: positions, from the run's first sample.
            first: also the blocks that are needed until then, for the beginning of a run.
        """
        found: list[tuple[int, int]] = []
        start, period = 0, int(self._running[-1])
        for group, (size, quota) in enumerate(zip(self.sizes, np.diff(self._running).tolist(), strict=True)):
            blocks = -(-size // self.block)
            lead = -(-blocks // max(1, blocks // self.window)) * self.block  # samples in the longest window
            # In whole periods: within one, any group may come first.
            low, high = (-(-at // period) * quota for at in (begin, end))
            low = begin // period * quota // self.block * self.block if first else self._border(low + lead, size)
            high = self._border(high + lead, size)
            starts = _block_starts(low, high, size, self.block, self.seed % 2**63, group)
            for sample in starts.tolist():
                count = min(self.block, size)
                over = max(0, sample + count - size)  # blocks go around the end
                found += [(start + sample, count - over), (start, over)] if over else [(start + sample, count)]
            start += size
        return found

    def _border(self, position: int, size: int) -> int:
        """The first position from `position` on at which a block begins, epochs beginning with one."""
        epoch, at = divmod(position, size)
        return min(epoch * size + -(-at // self.block) * self.block, (epoch + 1) * size)

    @property
    def _running(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.quotas)]).astype(np.int64)
