"""The order of samples: a bijection an epoch, split by ranks without loss, from any position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.order import batch_samples, permute


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(samples), np.full(samples, epoch), samples, seed)
    assert np.array_equal(np.sort(order), np.arange(samples))


def test_order_differs_by_seed_and_epoch_and_is_mixed() -> None:
    at = np.arange(5000)
    orders = [permute(at, np.full(5000, epoch), 5000, seed) for seed in (0, 1) for epoch in (0, 1)]
    for one in range(4):
        # A true shuffle keeps one element in place on average, and correlates with nothing.
        assert (orders[one] == at).sum() < 10
        assert abs(np.corrcoef(orders[one], at)[0, 1]) < 0.06
        for other in range(one):
            assert (orders[one] == orders[other]).sum() < 10


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_see_every_sample_once_an_epoch(world: int) -> None:
    batch, samples, epochs = 12, 100, 6
    seen = np.zeros((epochs, samples), int)
    for step in range(samples * epochs // batch):
        for rank in range(world):
            found, epoch = batch_samples(step, batch, rank, world, samples, seed=5)
            np.add.at(seen, (epoch, found), 1)
    assert (seen == 1).all()


def test_ranks_together_are_the_single_rank() -> None:
    whole = batch_samples(7, 24, 0, 1, 1000, 3)[0]
    parts = [batch_samples(7, 24, rank, 4, 1000, 3)[0] for rank in range(4)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_large_sets_cost_no_memory_of_their_own() -> None:
    samples = 1_280_000_000
    order = permute(np.arange(samples - 1000, samples), np.zeros(1000, int), samples, 0)
    assert len(np.unique(order)) == 1000
    assert 0 <= order.min() < samples // 10
    assert samples * 9 // 10 < order.max() < samples
