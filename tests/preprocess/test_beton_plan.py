"""Which rows stand in which beton: nothing lost or doubled, limits kept, and a shuffle that the seed alone decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labels.manifest import ShardPart
from labels.settings import Build
from preprocess.betons.plan import Group, Member, plan_groups, row_order
from preprocess.readers.shards import Shard


def shards(rows: list[int], first: int = 0, size: int = 0) -> list[Member]:
    """Shards of this many rows, `size` bytes a row."""
    members = []
    for number, count in enumerate(rows):
        name = f"{number:08d}"
        part = ShardPart(
            name=name,
            source=name,
            source_bytes=1,
            first_index=first,
            rows=count,
            labels_sha256="",
            keys_sha256="",
            quarantined={},
        )
        members.append(Member(Shard(name, f"/data/{name}.tar", count * size, ""), part, number, count * size))
        first += count
    return members


def indices(groups: list[Group], settings: Build) -> list[list[int]]:
    """Positions of the rows of every beton, counted through all shards."""
    return [
        (order + group.members[0].part.first_index).tolist() for group in groups for order in row_order(group, settings)
    ]


@given(
    rows=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    samples=st.integers(1, 40),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**70),
    size=st.integers(0, 3),
)
def test_every_row_once_and_within_the_limits(rows: list[int], samples: int, window: int, seed: int, size: int) -> None:
    limit_bytes = 40
    settings = Build(beton_samples=samples, shuffle_window=window, shuffle_seed=seed, beton_size=limit_bytes / 2**30)
    groups = plan_groups([shards(rows, size=size)], settings)
    betons = indices(groups, settings)
    assert sorted(index for beton in betons for index in beton) == list(range(sum(rows)))
    assert all(0 < len(beton) <= samples for beton in betons)
    # Evenly divided: a beton may hold a row more than its share of the bytes.
    assert all((len(beton) - 1) * size <= limit_bytes for beton in betons)
    assert [group.first for group in groups] == np.cumsum([0, *(group.files for group in groups)])[:-1].tolist()
    if window == 1:
        assert [index for beton in betons for index in beton] == list(range(sum(rows)))
    for at in range(0, len(rows), window):  # a row stays in its window
        first, last = sum(rows[:at]), sum(rows[: at + window])
        flat = [index for beton in betons for index in beton]
        assert sorted(flat[first:last]) == list(range(first, last))


def test_a_shard_of_ten_thousand_is_a_beton_and_small_ones_are_put_together() -> None:
    def files(rows: list[int], size: int = 50_000) -> list[tuple[int, int]]:
        return [(len(group.members), group.files) for group in plan_groups([shards(rows, size=size)], Build())]

    assert files([10_000, 8_500, 9_700]) == [(1, 1), (1, 1), (1, 1)]
    assert files([1_000] * 25) == [(10, 1), (10, 1), (5, 1)]
    assert files([25_000]) == [(1, 3)]
    assert files([10_000], size=1_000_000) == [(1, 3)], "10 GB in betons of 4 GiB"


def test_no_beton_spans_two_batches() -> None:
    first, second = shards([5, 5]), shards([5, 5], first=10)
    assert [len(group.members) for group in plan_groups([first, second], Build())] == [2, 2]
    assert [len(group.members) for group in plan_groups([[*first, *second]], Build())] == [4]


def test_the_shuffle_mixes_its_window_and_depends_on_the_seed_alone() -> None:
    rows = [500] * 4

    def order(seed: int) -> np.ndarray:
        settings = Build(shuffle_window=4, shuffle_seed=seed)
        (beton,) = indices(plan_groups([shards(rows)], settings), settings)
        return np.array(beton)

    assert np.array_equal(order(0), order(0)) and not np.array_equal(order(0), order(1))
    quarters = order(0).reshape(4, 500) // 500
    counts = np.array([np.bincount(quarter, minlength=4) for quarter in quarters])
    assert np.abs(counts - 125).max() < 50, "each quarter of the beton has about a quarter of each shard"
    assert abs(np.corrcoef(order(0), np.arange(2000))[0, 1]) < 0.1
    # Golden: the bytes of betons rest on it.
    assert order(0)[:8].tolist() == [591, 1677, 1670, 281, 773, 950, 462, 901]


@pytest.mark.parametrize("seed", [0, 2**64, 2**64 - 1])
def test_any_seed_is_taken(seed: int) -> None:
    settings = Build(shuffle_window=2, shuffle_seed=seed)
    assert sorted(indices(plan_groups([shards([3, 4])], settings), settings)[0]) == list(range(7))
