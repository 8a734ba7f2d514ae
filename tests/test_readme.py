"""README.md: its code runs, its commands exist, its numbers are the measured ones."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = ROOT / "profiling" / "readme_table.py"


FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for name, text in FENCED if name == language]


def commands():
    lines = "\n".join(blocks("bash")).splitlines()
    inline = re.findall(r"`(python [^`]+|make [^`]+)`", README)
    return [c for line in [*lines, *inline] if (c := line.split("#")[0].strip())]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_block_runs(code, tmp_path):
    # as a newcomer runs it: the kernels' interpreter is for tests of the kernels
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["OMP_NUM_THREADS"] = "1"  # two on a busy machine cost minutes
    script = tmp_path / "block.py"
    script.write_text(code)
    child = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip()


def test_there_are_commands_and_code():
    assert {"make demo", "make test"} <= set(commands())
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_target_exists(command):
    dry = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python -m ")])
def test_module_runs(command):
    child = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip()


SCRIPT = re.compile(r"python (?!-)")


@pytest.mark.parametrize("command", [c for c in commands() if SCRIPT.match(c)])
def test_script_knows_its_options(command):
    _, script, *arguments = command.split()
    assert (ROOT / script).is_file()
    options = {a for a in arguments if a.startswith("--")}
    if options:
        shown = subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        assert options <= set(re.findall(r"--[a-z-]+", shown.stdout))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("pip ")])
def test_extras_exist(command):
    setup = (ROOT / "setup.py").read_text()
    for extra in re.findall(r"\[(\w+)\]", command):
        assert f'"{extra}": [' in setup


def test_every_command_is_checked():
    assert not [c for c in commands() if c.split()[0] not in ("make", "python", "pip")]


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link.split("#")[0] for link in links if "://" not in link]
    assert local and not [link for link in local if not (ROOT / link).is_file()]


def test_paths_in_the_layout_exist():
    (layout,) = [block for block in blocks("") if block.startswith("moe_gpu/")]
    for line in layout.splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line


def test_numbers_are_the_measured_ones():
    check = subprocess.run([sys.executable, TABLE, "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


@pytest.fixture
def table(tmp_path):
    """A README and a page of our own, and a function that runs the script on them."""
    readme, page = tmp_path / "README.md", tmp_path / "quality.md"
    for path in (readme, page):
        path.write_text("a\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nb\n")
    with readme.open("a") as file:
        file.write("<!-- families: begin -->\nold\n<!-- families: end -->\nb\n")
    results = tmp_path / "results"
    results.mkdir()

    def run(*arguments):
        where = ["--readme", readme, "--page", page, "--results", results]
        command = [sys.executable, TABLE, *where, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    run.readme, run.page, run.results = readme, page, results / "quality.json"
    return run


def test_table_without_results_says_not_measured(table):
    assert table("--check").returncode == 1 and "old" in table.readme.read_text()
    assert table().returncode == 0
    for path in (table.readme, table.page):
        text = path.read_text()
        assert "not measured" in text and text.startswith("a\n") and text.endswith("\nb\n")
    assert table("--check").returncode == 0


def bounds(value, **more):
    return {"value": value, "low": value - 0.02, "high": value + 0.03} | more


HEADLINE = {
    "kind": "8 experts, top-2", "text": "held out", "slots": 4, "resident": "4 of 8",
    "lru_loads_per_token": 2.136, "default_eviction_cut": bounds(0.16),
    "cut": {
        "mass budget": {"0.5": bounds(0.71, is_bound=True)},
        "quality budget": {"0.5": bounds(0.75, is_bound=False)},
    },
    "kl_ratio": {"mass budget": {"0.5": bounds(0.42), "0.9": None}},
}  # fmt: skip


def test_table_holds_the_results(table):
    default = {
        "kind": "8 experts, top-2", "text": "held out", "resident": "4 of 8",
        "family": "quality budget", "strength": 0.05, "hit_rate": 0.8512, "loads_per_token": 1.1999,
        "perplexity_change_percent": bounds(0.051),
    }  # fmt: skip
    content = {
        "conditions": {"torch": "2.13.0", "domains": ["code", "prose"]},
        "headline": [HEADLINE, HEADLINE | {"text": "switching domains", "resident": "5 of 8"}],
        "rows": [default, default | {"strength": 0.06, "hit_rate": 0.9}],
    }
    table.results.write_text(json.dumps(content))
    assert table().returncode == 0
    text = table.readme.read_text()
    cells = (
        "not measured | not measured | at least 71 % (69 to 74) | 75 % (73 to 78) | not measured |"
    )
    assert f"| 8 experts, top-2 | 4 of 8 | 2.14 | 16 % (14 to 19) | {cells}" in text
    assert "5 of 8" not in text
    assert "85.1% hits, 1.20 loads a token, +0.05 % perplexity (+0.03 to +0.08)." in text
    assert "torch 2.13.0; domains code, prose." in text
    page = table.page.read_text()
    assert "| model | against | 50% saved | 90% saved |" in page
    assert "| 8 experts, top-2 | mass budget | 0.42 (0.40 to 0.45) |  |" in page
    table.page.write_text(page.replace("0.42", "0.41"))
    assert table("--check").returncode == 1


def test_table_says_what_eviction_is_worth(table):
    table.results.write_text(json.dumps({"conditions": {}, "headline": [], "rows": []}))
    default = {"title": "affinity 0.9/0.1, bypass"}
    rates = {default["title"]: [0.5, 0.7], "LRU": [0.4, 0.6], "Belady, bypass": [0.7, 0.8]}
    content = {
        "decision": {
            "default": default,
            "gain_recorded": {"value": 0.1, "low": 0.09, "high": 0.112},
        },
        "summary": [
            {"title": title, "hit_rate": {"recorded": {"value": by_size}, "drawn": {"value": [0]}}}
            for title, by_size in rates.items()
        ],
        "traces": [
            {"group": "drawn, 9 top-3", "trace": trace, "default": {"value": gain}}
            for trace, gain in (("calm", 0.2), ("bursts", -0.01))
        ],
    }
    table.results.with_name("eviction.json").write_text(json.dumps(content))
    assert table().returncode == 0
    text = table.readme.read_text()
    assert "affinity 0.9/0.1, bypass: +10.00 points of hit rate over LRU (+9.00 to +11.20)" in text
    assert (
        "gains +25.00. On the worst of the traces, a drawn one of bursts (9 experts, top-3), "
        in text
    )
    assert "it loses 1.00 points." in text


def test_families_of_which_the_same_works_share_a_row(table):
    works, trains_not = {"load": "yes", "train": "yes"}, {"load": "yes", "train": "refused"}
    rows = [("b", trains_not), ("a", works), ("c", works)]
    content = {
        "conditions": {"torch": "2.13.0"},
        "rows": [{"family": name, "cells": cells} for name, cells in rows],
        "refused": {"OddRouter": "it returns nothing"},
    }
    table.results.with_name("families.json").write_text(json.dumps(content))
    assert table().returncode == 0
    text = table.readme.read_text()
    assert "| model type | load | train |\n| --- | --- | --- |\n| `a`, `c` | yes | yes |\n" in text
    assert (
        "| `b` | yes | refused |\n\nRefused: `OddRouter`, since it returns nothing. "
        "On small random models, with torch 2.13.0;"
    ) in text
    content["rows"][0]["cells"]["train"] = "yes"
    table.results.with_name("families.json").write_text(json.dumps(content))
    assert table("--check").returncode == 1


def test_table_refuses_a_readme_without_markers(table):
    table.readme.write_text("nothing here")
    assert table().returncode == 1 and table.readme.read_text() == "nothing here"
