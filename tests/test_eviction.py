"""Victim policies: the order typed by hand."""

import pytest

from moe_gpu.offload.eviction import (
    LFU,
    LRU,
    POLICIES,
    Affinity,
    AffinityOverAge,
    AffinityOverRootAge,
    eviction_policy,
)
from moe_gpu.offload.history import History


def history_of(steps, affinity, num_layers=1):
    """Run steps of (layer, keys) and learn the affinity of every key."""
    num_experts = len(affinity) // num_layers
    history = History(num_layers, num_experts)
    for layer, keys in steps:
        history.touch(layer, keys)
    for layer in range(num_layers):
        history.learn(layer, affinity[layer * num_experts : (layer + 1) * num_experts])
    return history


# key:       0     1     2     3     4 (never)
# age:       4     1     0     0     11
# uses:      1     3     1     2     0
# affinity:  0.9   0.5   0.1   0.1   0.0
# over age:  0.18  0.25  0.1   0.1   0.0
# over root: 0.40  0.35  0.1   0.1   0.0
LAYER = history_of(
    [(0, [0]), (0, [1]), (0, [1]), (0, [1, 3]), (0, [2, 3])], [0.9, 0.5, 0.1, 0.1, 0.0]
)

# two layers of three keys; layer 1 runs now, so layer 0 is next
# key:       0     1     2   | 3     4     5
# age:       0     1     3   | 0     1     3 (2 and 5 never)
# wait:      0     0     0   | 1     1     1
# uses:      1     1     0   | 1     1     0
# affinity:  0.2   0.8   0     0.4   0.8   0
# over age:  0.2   0.4   0     0.4   0.4   0
# over root: 0.2   0.57  0     0.4   0.57  0
POOL = history_of(
    [(0, [1]), (1, [4]), (0, [0]), (1, [3])], [0.2, 0.8, 0.0, 0.4, 0.8, 0.0], num_layers=2
)

EQUAL = history_of([(0, [0, 1, 2])], [0.5, 0.5, 0.5])
UNUSED = History(2, 2)


@pytest.mark.parametrize(
    "policy, history, expected",
    [
        pytest.param(LRU(), LAYER, [4, 0, 1, 2, 3], id="lru: oldest first, lower key on a tie"),
        pytest.param(LFU(), LAYER, [4, 0, 2, 3, 1], id="lfu: rarest first, then the oldest"),
        pytest.param(Affinity(), LAYER, [4, 2, 3, 1, 0], id="affinity: lowest first"),
        pytest.param(AffinityOverAge(), LAYER, [4, 2, 3, 0, 1], id="over age: 0.9 long ago < 0.5"),
        pytest.param(LRU(), POOL, [5, 2, 4, 1, 3, 0], id="lru, pool: the layer that ran last"),
        pytest.param(LFU(), POOL, [5, 2, 4, 1, 3, 0], id="lfu, pool: age, then the layer"),
        pytest.param(Affinity(), POOL, [5, 2, 0, 3, 4, 1], id="affinity, pool"),
        pytest.param(AffinityOverAge(), POOL, [5, 2, 0, 4, 1, 3], id="over age, pool: older first"),
        pytest.param(AffinityOverRootAge(), LAYER, [4, 2, 3, 1, 0], id="over root age: 0.9 / 2.2"),
        pytest.param(AffinityOverRootAge(), POOL, [5, 2, 0, 3, 4, 1], id="over root age, pool"),
        *[
            pytest.param(make(), EQUAL, [0, 1, 2], id=f"{name}: all equal, lower keys")
            for name, make in POLICIES.items()
        ],
        *[
            pytest.param(make(), UNUSED, [2, 3, 0, 1], id=f"{name}: unused, the later layer")
            for name, make in POLICIES.items()
        ],
    ],
)
def test_order(policy, history, expected):
    assert policy.rank(list(range(len(expected))), history) == expected
    assert policy.rank(expected[::-1], history) == expected, "the order of the input is ignored"


@pytest.mark.parametrize("policy", [make() for make in POLICIES.values()], ids=POLICIES)
def test_ranks_only_what_it_is_given(policy):
    assert policy.rank([], LAYER) == []
    assert policy.rank([3], LAYER) == [3]
    everybody = policy.rank([0, 1, 2, 3, 4], LAYER)
    assert policy.rank([3, 0, 1], LAYER) == [key for key in everybody if key in (0, 1, 3)]


def test_affinity_ties_go_to_the_older():
    history = history_of([(0, [0]), (0, [1])], [0.5, 0.5])
    assert Affinity().rank([0, 1], history) == [0, 1]
    history.touch(0, [0])
    assert Affinity().rank([0, 1], history) == [1, 0]


def test_affinity_beats_age():
    history = history_of([(0, [0]), (0, [1]), (0, [1])], [0.6, 0.5])
    assert Affinity().rank([0, 1], history) == [1, 0]
    assert LRU().rank([0, 1], history) == [0, 1]
    assert AffinityOverAge().rank([0, 1], history) == [0, 1]  # 0.2 and 0.5
    assert AffinityOverRootAge().rank([0, 1], history) == [0, 1]  # 0.35 and 0.5


def test_names_and_objects():
    assert {name: type(eviction_policy(name)) for name in POLICIES} == POLICIES
    assert POLICIES == {
        "affinity": Affinity, "affinity_over_age": AffinityOverAge,
        "affinity_over_root_age": AffinityOverRootAge, "lfu": LFU, "lru": LRU,
    }  # fmt: skip
    own = LRU()
    assert eviction_policy(own) is own


def test_refuses_what_cannot_rank():
    known = ", ".join(f"'{name}'" for name in POLICIES)
    with pytest.raises(ValueError, match=f"eviction must be one of {known} or an.*got 'fifo'"):
        eviction_policy("fifo")
    with pytest.raises(TypeError, match="eviction must have a method rank.*got 3"):
        eviction_policy(3)
