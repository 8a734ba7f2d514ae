"""Victim policies: the order typed by hand."""

import pytest

from moe_gpu.offload.eviction import LRU, Affinity, eviction_policy

LAST_USE = [9, 3, 3, 7]  # by expert id
AFFINITY = [0.5, 0.9, 0.1, 0.5]


@pytest.mark.parametrize(
    "policy, experts, expected",
    [
        pytest.param(LRU(), [0, 1, 2, 3], [1, 2, 3, 0], id="lru: oldest first, lower id on a tie"),
        pytest.param(LRU(), [3, 2], [2, 3], id="lru: only the candidates, input order is ignored"),
        pytest.param(Affinity(), [0, 1, 2, 3], [2, 3, 0, 1], id="affinity: tie by last use"),
        pytest.param(Affinity(), [], [], id="nobody"),
    ],
)
def test_order(policy, experts, expected):
    assert policy.rank(experts, LAST_USE, AFFINITY) == expected


def test_affinity_ties_in_age_too_go_to_the_lower_id():
    assert Affinity().rank([2, 1], [5, 5, 5], [0.0, 0.0, 0.0]) == [1, 2]


def test_names_and_objects():
    assert isinstance(eviction_policy("lru"), LRU)
    assert isinstance(eviction_policy("affinity"), Affinity)
    own = LRU()
    assert eviction_policy(own) is own


def test_refuses_what_cannot_rank():
    with pytest.raises(ValueError, match="eviction must be one of 'affinity', 'lru'.*got 'fifo'"):
        eviction_policy("fifo")
    with pytest.raises(TypeError, match="eviction must have a method rank.*got 3"):
        eviction_policy(3)
