# SPDX-License-Identifier: Apache-2.0
"""The partitioner: equal shares, none twice, as skewed as alpha says."""

import numpy as np
import pytest

from tests.helpers import benchmark


@pytest.fixture
def partition():
    return benchmark("tasks.partition")


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 400))


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.25, 1.0, 100.0, float("inf")])
@pytest.mark.parametrize("workers", [1, 8, 10, 32])
def test_shares_are_equal_and_disjoint(partition, alpha, workers):
    parts = partition.dirichlet(LABELS, workers, alpha, seed=3)
    assert [len(rows) for rows in parts] == [len(LABELS) // workers] * workers
    everything = np.concatenate(parts)
    assert len(np.unique(everything)) == len(everything)
    again = partition.dirichlet(LABELS, workers, alpha, seed=3)
    assert all(map(np.array_equal, parts, again))


def test_smaller_alpha_is_more_skewed(partition):
    alphas = (0.05, 0.25, 1.0, 10.0, 100.0, float("inf"))
    found = [
        np.mean([partition.skew(LABELS, partition.dirichlet(LABELS, 10, a, s)) for s in range(5)])
        for a in alphas
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.7
    assert found[-1] < 0.1


def test_a_tiny_alpha_is_no_less_skewed(partition):
    """Where gammas are too small for a float, a label that has run out is followed by one other."""
    parts = partition.dirichlet(LABELS, 20, 1e-6, seed=0)
    many = [len(np.unique(LABELS[rows])) for rows in parts]
    assert np.mean(many) < 2
    assert partition.skew(LABELS, parts) > 0.85


def test_groups_stay_whole(partition):
    groups = np.repeat(np.arange(7), [50, 10, 40, 30, 20, 60, 5])
    parts = partition.by_group(groups, 3)
    assert sorted(np.concatenate(parts)) == list(range(len(groups)))
    held = [set(groups[rows]) for rows in parts]
    assert sum(map(len, held)) == 7
    sizes = [len(rows) for rows in parts]
    assert max(sizes) - min(sizes) <= 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.dirichlet(LABELS, 8, 0, 0), r"`alpha` must be above 0 .* got 0\."),
        (lambda p: p.dirichlet(LABELS, 8, float("nan"), 0), r"`alpha` must be above 0 .* got nan"),
        (lambda p: p.dirichlet(LABELS, 0, 1.0, 0), r"`workers` must lie in \[1, 4000\]"),
        (lambda p: p.by_group(LABELS, 11), r"`workers` must be at most 10"),
    ],
)
def test_bad_splits_are_refused(partition, call, message):
    with pytest.raises(ValueError, match=message):
        call(partition)


def test_picture(partition, tmp_path):
    splits = {f"alpha {a}": partition.dirichlet(LABELS, 8, a, 0) for a in (0.05, 100.0)}
    partition.picture(LABELS, splits, tmp_path / "who.png")
    assert (tmp_path / "who.png").stat().st_size > 5_000
