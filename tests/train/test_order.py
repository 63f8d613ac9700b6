"""The order of samples: a bijection an epoch, split by ranks without loss, from any position, mixed well."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.order import Order


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """All samples of one epoch of an order of one group."""
    size = order.sizes[0]
    samples, epochs = order.take(epoch * size, size)
    assert (epochs == epoch).all()
    return samples


@given(st.integers(1, 3000), st.integers(1, 80), st.integers(1, 70), st.integers(0, 2**70), st.integers(0, 10**6))
@settings(deadline=None)  # the first example waits for the compiler
def test_an_epoch_is_a_permutation(samples: int, block: int, window: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_of(Order([samples], (1,), block, window, seed), epoch)), np.arange(samples))


@pytest.mark.parametrize("block", [1, 16])
def test_order_differs_by_seed_and_epoch_and_is_mixed(block: int) -> None:
    at = np.arange(5000)
    orders = [epoch_of(Order([5000], (1,), block, 320, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one in range(4):
        # A true shuffle keeps one element in place on average, and correlates with nothing.
        assert (orders[one] == at).sum() < 10
        assert abs(np.corrcoef(orders[one], at)[0, 1]) < 0.06
        assert abs(np.corrcoef(orders[one][1:], orders[one][:-1])[0, 1]) < 0.06
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 10


def test_all_permutations_of_a_few_samples_come_alike() -> None:
    found = [tuple(epoch_of(Order([4], seed=3), epoch)) for epoch in range(4800)]
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 24
    assert counts.min() > 120  # 200 each, standard deviation 14
    assert counts.max() < 280


def test_a_window_holds_whole_blocks_in_random_order() -> None:
    order = Order([6400], (1,), block=64, window=10, seed=1)
    samples = epoch_of(order, 0)
    for window in samples.reshape(10, 640):
        blocks = np.sort(window)
        # Ten runs of 64 neighbours; the whole is turned, so one run may wrap around.
        assert 9 <= (np.diff(blocks) > 1).sum() + 1 <= 11
        assert (np.abs(np.diff(window)) == 1).sum() < 20
    # Blocks begin elsewhere in the next epoch.
    firsts = []
    for epoch in (0, 1):
        window = np.sort(epoch_of(order, epoch)[:640])
        firsts.append(set(window[1:][np.diff(window) > 1] % 64))
    assert firsts[0] != firsts[1]


def test_ranks_and_restarts_see_every_sample_as_often_as_one_rank() -> None:
    """20 runs, resumed with other numbers of ranks at random steps: each epoch has every sample exactly once."""
    dice = random.Random(0)
    order = Order([1000], (1,), block=16, window=5, seed=5)
    batch, epochs = 120, 6
    for _ in range(20):
        seen = np.zeros((epochs, 1000), int)
        step = 0
        while step < 1000 * epochs // batch:
            world = dice.choice([1, 2, 3, 8])
            for at in range(step, min(step + dice.randint(1, 20), 1000 * epochs // batch)):
                for rank in range(world):
                    samples, epoch = order.batch(at, batch, rank, world)
                    np.add.at(seen, (epoch, samples), 1)
                step = at + 1
        assert (seen == 1).all()


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_together_are_the_single_rank(world: int) -> None:
    order = Order([1000], (1,), 8, 6, 3)
    whole = order.batch(7, 24, 0, 1)[0]
    parts = [order.batch(7, 24, rank, world)[0] for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_groups_have_their_exact_share_and_each_its_own_epochs() -> None:
    order = Order([100, 3000, 50], (5, 3, 2), 8, 4, 7)
    samples, epochs = order.take(0, 10_000)
    group = np.searchsorted([100, 3100], samples, side="right")
    for period in group.reshape(-1, 10):
        assert np.bincount(period, minlength=3).tolist() == [5, 3, 2]
    assert len({tuple(period) for period in group.reshape(-1, 10)}) > 500
    first = samples[group == 0]
    assert np.array_equal(epochs[group == 0], np.arange(5000) // 100)
    for epoch in range(50):
        assert np.array_equal(np.sort(first[epoch * 100 : epoch * 100 + 100]), np.arange(100))
    # A pure function of position: any piece is the same.
    assert np.array_equal(order.take(4321, 77)[0], samples[4321 : 4321 + 77])


@given(st.integers(1, 60), st.integers(1, 50), st.integers(1, 30), st.integers(1, 300))
@settings(max_examples=50, deadline=None)
def test_every_block_is_announced_before_its_samples_come(blocks: int, block: int, window: int, batch: int) -> None:
    sizes = [blocks * block, 7 * block]
    order = Order(sizes, (3, 1), block, window, 2)
    announced = np.zeros(sum(sizes), bool)
    for begin in range(0, 3 * sizes[0], batch):
        for first, count in order.readahead(begin, begin + batch, first=begin == 0):
            announced[first : first + count] = True
        assert announced[order.take(begin, batch)[0]].all()


def test_large_sets_cost_no_memory_of_their_own() -> None:
    for samples in (1_280_000_000, 10**10):
        order = Order([samples], (1,), 64, 1024).take(samples - 100_000, 100_000)[0]
        assert len(np.unique(order)) == 100_000
        assert order.min() >= 0
        assert order.max() < samples
