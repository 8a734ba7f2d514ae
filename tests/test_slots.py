"""SlotTable: what each verb changes, and what it refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.offload.slots import NONE, SlotTable


def test_a_new_table_is_empty():
    table = SlotTable(num_keys=3, num_slots=2)
    assert (table.slot_of_X, table.key_in_S) == ([NONE] * 3, [NONE] * 2)
    assert (table.residents(), table.free_slots()) == ([], [0, 1])


def test_load_and_evict():
    table = SlotTable(4, 2)
    table.load(3, slot=1)
    table.load(0, slot=0)
    assert table.slot_of_X == [0, NONE, NONE, 1] and table.key_in_S == [0, 3]
    assert table.residents() == [0, 3] and table.free_slots() == []
    assert table.evict(3) == 1
    assert table.slot_of_X == [0, NONE, NONE, NONE] and table.free_slots() == [1]


@pytest.mark.parametrize(
    "expert, slot",
    [pytest.param(1, 0, id="slot taken"), pytest.param(0, 1, id="expert resident elsewhere")],
)
def test_refuses_to_load(expert, slot):
    table = SlotTable(4, 2)
    table.load(0, slot=0)
    assert not table.can_load(expert, slot)
    with pytest.raises(RuntimeError, match=f"cannot load key {expert} into slot {slot}"):
        table.load(expert, slot)
    assert table.slot_of_X == [0, NONE, NONE, NONE]


def test_a_lease_forbids_eviction_until_the_last_is_given_back():
    table = SlotTable(4, 2)
    table.load(2, slot=0)
    table.lease(2)
    table.lease(2)
    table.release(2)
    assert not table.can_evict(2)
    with pytest.raises(RuntimeError, match="cannot evict key 2"):
        table.evict(2)
    table.release(2)
    assert table.can_evict(2)


def test_leases_need_a_resident_expert():
    table = SlotTable(4, 2)
    for verb in (table.lease, table.release, table.evict):
        with pytest.raises(RuntimeError, match="key 1"):
            verb(1)
    table.load(1, slot=0)
    with pytest.raises(RuntimeError, match="holds no lease"):
        table.release(1)


def test_probation_ends_with_eviction():
    table = SlotTable(4, 2)
    table.load(2, slot=0)
    table.probation.add(2)
    table.check()
    table.evict(2)
    assert not table.probation


def test_evictable_leaves_out_the_leased_and_the_kept():
    table = SlotTable(5, 4)
    for key in (4, 0, 3):
        table.load(key, slot=table.free_slots()[0])
    table.lease(3)
    assert table.evictable() == [0, 4]
    assert table.evictable(keep=[4]) == [0]


def test_check_notices_each_kind_of_damage():
    for damage in (
        lambda t: t.slot_of_X.__setitem__(1, 0),  # two experts claim a slot
        lambda t: t.key_in_S.__setitem__(1, 1),  # a slot claims a missing expert
        lambda t: t.leases_S.__setitem__(1, 1),  # a free slot is leased
        lambda t: t.leases_S.__setitem__(0, -1),
        lambda t: t.probation.add(2),
    ):
        table = SlotTable(3, 2)
        table.load(0, slot=0)
        table.check()
        damage(table)
        with pytest.raises(AssertionError):
            table.check()


VERBS = st.tuples(st.sampled_from(["load", "evict", "lease", "release"]), st.integers(0, 4))


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(VERBS, st.integers(0, 4)), max_size=40))
def test_no_sequence_of_verbs_breaks_the_invariants(num_slots, calls):
    table = SlotTable(5, num_slots)
    for (verb, expert), slot in calls:
        arguments = (expert, slot % num_slots) if verb == "load" else (expert,)
        before = (table.slot_of_X[:], table.key_in_S[:], table.leases_S[:])
        try:
            getattr(table, verb)(*arguments)
        except RuntimeError:
            assert before == (table.slot_of_X, table.key_in_S, table.leases_S)
        table.check()
