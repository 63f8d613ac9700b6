"""In which order samples are seen: a pure function of (seed, epoch, position), in O(1) memory, from any position.

Each epoch is one keyed permutation of 0..N-1 (a Feistel network, cycle-walked into the range), so every sample comes
exactly once an epoch, whatever the batch size, the number of ranks, or where the run was interrupted.
"""

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014): uint64 to well-mixed uint64, elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: np.ndarray, epochs: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Which sample stands at a position of an epoch.

    Args:
        positions: int64 [B], each in [0, samples).
        epochs: int64 [B].
        samples: N.
        seed: any non-negative integer.

    Returns:
        int64 [B], sample numbers in [0, N); for a fixed epoch a bijection.
    """
    half_bits = max(1, ((max(samples, 2) - 1).bit_length() + 1) // 2)
    half = np.uint64(half_bits)
    low = np.uint64((1 << half_bits) - 1)
    keys = mix(epochs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed * 0xD1342543DE82EF95 & _MASK))
    result = positions.astype(np.uint64)
    walking = np.ones(len(result), bool)
    while walking.any():
        value, key = result[walking], keys[walking]
        left, right = value >> half, value & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(right + key + np.uint64(number * 0xA24BAED4963EE407 & _MASK)) & low)
        result[walking] = (left << half) | right
        walking = result >= samples  # outside the range: walk on along the cycle until back inside
    return result.astype(np.int64)


def batch_samples(step: int, batch_size: int, rank: int, world: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What one rank sees in one step.

    Args:
        step: from 0.
        batch_size: over all ranks; a multiple of `world`.
        rank, world: this rank and how many there are.
        samples: N, samples in an epoch.
        seed: of the order.

    Returns:
        sample numbers int64 [batch_size / world] and their epochs int64 of the same shape. A batch may span epochs.
    """
    share = batch_size // world
    at = step * batch_size + rank * share + np.arange(share, dtype=np.int64)
    epochs = at // samples
    return permute(at % samples, epochs, samples, seed), epochs
