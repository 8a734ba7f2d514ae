"""The link simulation: its bounds by hand, and that it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROFILING = Path(__file__).parents[1] / "profiling"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(PROFILING))
    import bench_offload

    yield bench_offload
    sys.path.remove(str(PROFILING))


@pytest.mark.parametrize(
    "steps, expected",
    [
        pytest.param([(5, [1, 1], [])], 0, id="hits only"),
        pytest.param([(5, [], [1])], 10, id="one miss, nothing to hide it behind"),
        pytest.param([(5, [4, 2], [1])], 4, id="hits hide part of it"),
        pytest.param([(5, [], [3, 3])], 10 + 7, id="a copy runs while the one before computes"),
        pytest.param([(5, [], [15, 3])], 10, id="compute is longer than the copy"),
        pytest.param(
            [(5, [2], [1]), (3, [], [1])], 8 + (20 - 14), id="the link goes on between layers"
        ),
        pytest.param([(5, [2], [1]), (30, [], [1])], 8, id="and is done before the next layer"),
    ],
)
def test_bounds_by_hand(bench, steps, expected):
    assert bench.stalls(10, [bench.Step(*step) for step in steps]) == expected


def test_it_runs(tmp_path):
    out = tmp_path / "out.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = ["--device", "cpu", "--quick", "--part", "link", "--case", "ing", "--out", out]
    child = subprocess.run(
        [sys.executable, PROFILING / "bench_offload.py", *options],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    content = json.loads(out.read_text())
    rows = {row["case"]: row for row in content["link"]["rows"]}
    assert content["conditions"]["commit"] and "loads" not in content
    assert rows["streaming"]["prefetch_useful"] > 0 == rows["no streaming"]["prefetch_issued"]
    assert all(row["stall_ms_per_call"] > 0 and row["ratio"] > 0 for row in rows.values())
    text = out.with_suffix(".md").read_text()
    assert text.count("\n|") == 2 + len(rows) and text.strip() in child.stdout
