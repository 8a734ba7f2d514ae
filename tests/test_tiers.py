"""Homes of experts and the host's budget: exhaustive small cases, properties, fake machines."""

import itertools
import os
import warnings
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_gpu.offload.tiers import Tier, available_memory, host_budget, place

PINNED, PAGEABLE, DISK = Tier
RANK = {tier: rank for rank, tier in enumerate(Tier)}
GIB = 2**30


def test_order_is_expert_by_expert():
    assert place(2, 3, 10, pinned_memory=30, host_memory=59, on_disk=True) == [
        [PINNED, PINNED, PAGEABLE],
        [PINNED, PAGEABLE, DISK],
    ]


def test_the_hottest_go_first_then_expert_by_expert():
    tiers = place(2, 3, 10, 20, 40, on_disk=True, heat=[[0, 0, 5], [1, 0, 0]])
    assert tiers == [[PAGEABLE, PAGEABLE, PINNED], [PINNED, DISK, DISK]]


@pytest.mark.parametrize("layers, experts", list(itertools.product(range(1, 5), range(1, 5))))
def test_every_budget_of_a_small_model(layers, experts):
    total = layers * experts
    for host in range(0, 2 * total + 2):  # halves of experts
        for pinned in range(host + 1):
            tiers = place(layers, experts, 2, pinned, host, on_disk=True)
            counts = Counter(itertools.chain.from_iterable(tiers))
            assert counts[PINNED] == min(total, pinned // 2)
            assert counts[PINNED] + counts[PAGEABLE] == min(total, host // 2)
            for tier in Tier:
                per_layer = [row.count(tier) for row in tiers]
                assert max(per_layer) - min(per_layer) <= 1, (host, pinned, tier)
            for row in tiers:  # expert-major
                assert sorted(row, key=RANK.get) == row


@st.composite
def placements(draw):
    layers, experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    host = draw(st.integers(0, 100_000))
    row = st.lists(st.floats(-3, 3), min_size=experts, max_size=experts)
    return {
        "num_layers": layers,
        "num_experts": experts,
        "expert_bytes": draw(st.integers(1, 5000)),
        "pinned_memory": draw(st.integers(0, host)),
        "host_memory": host,
        "heat": draw(st.lists(row, min_size=layers, max_size=layers)),
    }


@given(placements())
def test_hotter_experts_are_never_in_a_slower_tier(case):
    tiers, heat = place(**case, on_disk=True), case["heat"]
    homes = list(itertools.product(range(case["num_layers"]), range(case["num_experts"])))
    by_tier = {tier: [heat[l][e] for l, e in homes if tiers[l][e] is tier] for tier in Tier}
    for faster, slower in itertools.combinations(Tier, 2):
        if by_tier[faster] and by_tier[slower]:
            assert min(by_tier[faster]) >= max(by_tier[slower])
    size = case["expert_bytes"]
    counts = {tier: len(values) for tier, values in by_tier.items()}
    assert counts[PINNED] * size <= case["pinned_memory"]
    assert (counts[PINNED] + counts[PAGEABLE]) * size <= case["host_memory"]
    # as many as fit
    assert not counts[DISK] or (len(homes) - counts[DISK] + 1) * size > case["host_memory"]
    slower = counts[PAGEABLE] + counts[DISK]
    assert not slower or (counts[PINNED] + 1) * size > case["pinned_memory"]


@given(placements())
def test_heat_without_differences_is_the_default(case):
    default = place(**case | {"heat": None}, on_disk=True)
    flat = [[1.0] * case["num_experts"]] * case["num_layers"]
    assert place(**case | {"heat": flat}, on_disk=True) == default


def test_without_files_everything_must_fit():
    assert place(2, 3, 10, 0, 60, on_disk=False) == [[PAGEABLE] * 3] * 2
    with pytest.raises(ValueError) as refusal:
        place(2, 3, 1000, 0, 5999, on_disk=False)
    assert str(refusal.value) == (
        "host_memory=5,999 bytes holds 5 of 6 experts of 1,000 bytes: all of them take 6,000"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 0}, "num_layers must be >= 1, got 0"),
        ({"num_experts": 0}, "num_experts must be >= 1, got 0"),
        ({"expert_bytes": 0}, "expert_bytes must be >= 1, got 0"),
        ({"pinned_memory": 61}, r"pinned_memory must lie in \[0, host_memory=60\], got 61"),
        ({"pinned_memory": -1}, r"pinned_memory must lie in \[0, host_memory=60\], got -1"),
        ({"heat": [[1, 2, 3]]}, r"heat must be 2 rows of 3, got rows of \[3\]"),
        ({"heat": [[1, 2, 3], [1, 2]]}, r"heat must be 2 rows of 3, got rows of \[3, 2\]"),
        ({"heat": [[1, 2, 3], [1, float("nan"), 3]]}, r"heat\[1\]\[1\] must be finite, got nan"),
    ],
)
def test_placement_refusals(changes, message):
    sizes = {"num_layers": 2, "num_experts": 3, "expert_bytes": 10}
    budgets = {"pinned_memory": 20, "host_memory": 60}
    with pytest.raises(ValueError, match=message):
        place(**sizes | budgets | changes, on_disk=True)


@pytest.mark.parametrize(
    "host, pinned, cuda, expected",  # of 100 bytes of experts and 1000 available
    [
        (None, None, True, (100, 100)),
        (None, None, False, (0, 100)),
        (60, None, True, (60, 60)),
        (60, 0, True, (0, 60)),
        (60, 60, True, (60, 60)),
        (None, 70, True, (70, 100)),
        (None, 70, False, (70, 100)),  # asked for: the caller knows why
        (500, 400, True, (100, 100)),  # never more than the experts take
        (0, None, True, (0, 0)),
    ],
)
def test_budgets_where_memory_is_plenty(host, pinned, cuda, expected):
    assert host_budget(host, pinned, 100, cuda=cuda, available=1000) == expected


@pytest.mark.parametrize(
    "host, pinned, expected",  # of 1000 bytes of experts and 100 available
    [
        (None, None, (50, 80)),
        (None, 0, (0, 80)),
        (None, 90, (90, 90)),
        (30, None, (30, 30)),
        (70, None, (50, 70)),
        (100, None, (50, 100)),
    ],
)
def test_budgets_where_memory_is_short(host, pinned, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert host_budget(host, pinned, 1000, cuda=True, available=100) == expected


def test_more_than_is_available_is_a_warning():
    with pytest.warns(RuntimeWarning, match="take 101 bytes of host memory, 100 are available"):
        assert host_budget(101, None, 1000, cuda=True, available=100) == (50, 101)


def test_unknown_memory():
    assert host_budget(80, None, 1000, cuda=True, available=None) == (40, 80)
    with pytest.raises(ValueError, match="host_memory must be given"):
        host_budget(None, None, 1000, cuda=True, available=None)


@pytest.mark.parametrize(
    "host, pinned, message",
    [
        (50, 51, "pinned_memory=51 bytes must be <= host_memory=50"),
        (-1, None, "host_memory must be >= 0 bytes, got -1"),
        (None, -1, "pinned_memory must be >= 0 bytes, got -1"),
    ],
)
def test_budget_refusals(host, pinned, message):
    with pytest.raises(ValueError, match=message):
        host_budget(host, pinned, 1000, cuda=True, available=100)


def machine(root, cgroup="", **files):
    """Write a fake machine with 8 GiB available."""
    files = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:  8388608 kB\n"} | files
    for name, text in (files | {"proc/self/cgroup": cgroup}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(folder, limit, current, inactive_file=0):
    stat = f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{current}\n",
        f"{folder}/memory.stat": stat,
    }


def v1(folder, limit, usage, inactive_file=0):
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": f"cache 1\ntotal_inactive_file {inactive_file}\n",
    }


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
UNLIMITED = 9223372036854771712


@pytest.mark.parametrize(
    "cgroup, files, expected",
    [
        pytest.param("", {}, 8 * GIB, id="no cgroup"),
        pytest.param("0::/\n", {}, 8 * GIB, id="root cgroup has no limit file"),
        pytest.param("0::/\n", v2(V2, "max", GIB), 8 * GIB, id="v2 unlimited"),
        pytest.param("0::/\n", v2(V2, 4 * GIB, GIB), 3 * GIB, id="v2 container"),
        pytest.param("0::/\n", v2(V2, 4 * GIB, 3 * GIB, GIB), 2 * GIB, id="page cache gives way"),
        pytest.param("0::/\n", v2(V2, 2 * GIB, 3 * GIB), 0, id="above its limit"),
        pytest.param("0::/\n", v2(V2, 99 * GIB, GIB), 8 * GIB, id="limit above the machine"),
        pytest.param(
            "0::/a/b\n",
            v2(f"{V2}/a", 3 * GIB, GIB) | v2(f"{V2}/a/b", "max", GIB),
            2 * GIB,
            id="limit of a parent",
        ),
        pytest.param("0::/host/path\n", v2(V2, 4 * GIB, GIB), 3 * GIB, id="the host's path"),
        pytest.param("4:memory:/\n0::/\n", v1(V1, UNLIMITED, GIB), 8 * GIB, id="v1 unlimited"),
        pytest.param("4:memory:/\n", v1(V1, 4 * GIB, 3 * GIB, GIB), 2 * GIB, id="v1 container"),
        pytest.param(
            "5:cpu,memory:/a:b\n", v1(f"{V1}/a:b", 2 * GIB, GIB), GIB, id="v1 colon in the name"
        ),
        pytest.param(
            "0::/a\n", v2("sys/fs/cgroup/unified/a", 2 * GIB, GIB), GIB, id="v2 of a hybrid"
        ),
        pytest.param("3:cpu:/\n", v1(V1, GIB, 0), 8 * GIB, id="other controllers"),
    ],
)
def test_available_memory_of_linux(cgroup, files, expected, tmp_path):
    assert available_memory(machine(tmp_path, cgroup, **files)) == expected


def test_available_memory_elsewhere(tmp_path, monkeypatch):
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}

    def sysconf(name):
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert available_memory(tmp_path) == 4096 * 1000  # macOS knows no free pages
    pages["SC_AVPHYS_PAGES"] = 10
    assert available_memory(tmp_path) == 40960
    monkeypatch.delattr(os, "sysconf")
    assert available_memory(tmp_path) is None


def test_available_memory_here():
    available = available_memory()
    assert available is None or available > 0
