"""The stress run: clean for a few seconds, and it notices what it is there to notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[1] / "profiling" / "soak.py"


def soak(*arguments, lives):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, SOAK, "--seconds", "100", "--lives", str(lives), *map(str, arguments)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_nothing_goes_wrong_for_some_lives(tmp_path):
    out = tmp_path / "soak.json"
    child = soak("--json", out, lives=3)
    assert child.returncode == 0, child.stdout + child.stderr
    report = json.loads(out.read_text())
    assert report["wrong_weights"] == report["hangs"] == 0
    assert report["faults_injected"] == report["faults_survived"]
    assert report["lives"] == 3 and report["calls"] >= 36 and report["faults_injected"]
    assert report["checksums_compared"] > 100 and report["loads"] > 50


@pytest.mark.parametrize("seed", [0])
def test_without_checksums_changed_bytes_are_noticed_where_they_are_used(seed):
    child = soak("--sabotage", "--seed", seed, lives=4)
    assert child.returncode == 1, child.stdout + child.stderr
    assert json.loads(child.stdout)["wrong_weights"] > 0
