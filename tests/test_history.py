"""History: what each verb leaves behind, and how keys of several layers compare."""

import pytest

from moe_gpu.offload.history import History


def test_nobody_was_used_yet():
    history = History(num_layers=2, num_experts=3)
    assert (history.num_layers, history.num_experts) == (2, 3)
    assert history.affinity == [0.0] * 6
    assert [history.uses(key) for key in range(6)] == [0] * 6
    assert len({history.age(key) for key in range(6)}) == 1


def test_age_counts_steps_since_the_last_use():
    history = History(1, 4)
    history.touch(0, [0, 1])
    history.touch(0, [1])
    history.touch(0, [2])
    assert [history.age(key) for key in (2, 1, 0)] == [0, 1, 2]
    assert history.age(3) > history.age(0), "never needed is older than any"


def test_uses_count_steps_not_the_last_alone():
    history = History(1, 3)
    for keys in ([0, 1], [1], [1]):
        history.touch(0, keys)
    assert [history.uses(key) for key in range(3)] == [1, 3, 0]


def test_a_step_that_needs_nobody_ages_all():
    history = History(1, 1)
    history.touch(0, [0])
    history.touch(0, [])
    assert history.age(0) == 1 and history.uses(0) == 1


def test_layers_of_a_pool_age_by_their_own_steps():
    history = History(2, 2)  # keys 0 and 1 are layer 0's, 2 and 3 layer 1's
    history.touch(0, [0])
    history.touch(1, [2])
    history.touch(0, [1])
    assert [history.age(key) for key in (0, 1, 2)] == [1, 0, 0]


@pytest.mark.parametrize("busy", [0, 1])
def test_never_used_is_older_than_any_use_in_any_layer(busy):
    history = History(2, 2)
    history.touch(busy, [2 * busy])
    for _ in range(9):
        history.touch(busy, [2 * busy + 1])
    used, idle_layer, same_layer = 2 * busy, 2 * (1 - busy), 2 * busy
    assert history.age(idle_layer) > history.age(used) == 9
    history.touch(1 - busy, [])
    assert history.age(idle_layer) > history.age(same_layer)


@pytest.mark.parametrize(
    "layer, waits",
    [
        pytest.param(0, [2, 2, 0, 0, 1, 1], id="the layer that runs now comes last"),
        pytest.param(1, [1, 1, 2, 2, 0, 0], id="in the middle"),
        pytest.param(2, [0, 0, 1, 1, 2, 2], id="the next token begins with layer 0"),
    ],
)
def test_wait_counts_the_layers_that_run_first(layer, waits):
    history = History(3, 2)
    history.touch(layer, [])
    assert [history.wait(key) for key in range(6)] == waits


def test_before_the_first_step_layer_0_is_next():
    assert [History(3, 1).wait(key) for key in range(3)] == [0, 1, 2]


def test_a_layer_alone_never_waits():
    history = History(1, 2)
    history.touch(0, [1])
    assert [history.wait(key) for key in (0, 1)] == [0, 0]


def test_learning_replaces_the_affinity_of_one_layer():
    history = History(3, 2)
    history.learn(1, [0.25, 0.5])
    assert history.affinity == [0, 0, 0.25, 0.5, 0, 0]
    history.learn(1, [0.125, 0.0])
    history.learn(2, [1.0, 0.75])
    assert history.affinity == [0, 0, 0.125, 0, 1, 0.75]


def test_recalls_what_another_run_said():
    old = History(2, 3)
    for layer, keys in ((0, [0, 1]), (1, [3]), (0, [1]), (1, [4]), (0, [])):
        old.touch(layer, keys)
    new = History(2, 3)
    for layer in range(2):
        keys = range(3 * layer, 3 * layer + 3)
        new.recall(layer, [old.age(key) for key in keys], [old.uses(key) for key in keys])
    used = [0, 1, 3, 4]
    assert [new.age(key) for key in used] == [old.age(key) for key in used] == [2, 1, 1, 0]
    assert [new.uses(key) for key in range(6)] == [1, 2, 0, 1, 1, 0]
    assert min(new.age(2), new.age(5)) > 2, "never needed is older than any"
    new.touch(0, [2])
    assert (new.age(2), new.age(1), new.age(0)) == (0, 2, 3)


def test_recalls_that_nobody_was_used():
    history = History(1, 2)
    history.recall(0, [7, 7], [0, 0])
    history.touch(0, [1])
    assert history.age(1) == 0 < history.age(0)
