"""docs/: the code runs, and what it names exists."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_gpu

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "larger_than_the_gpu.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def rows(heading):
    """The first cells of the table under a heading."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in table[2:]]


@pytest.fixture
def newcomer(tmp_path):
    """A folder with the example model in it, and the environment of somebody who runs the page."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {"cwd": tmp_path, "env": env | {"OMP_NUM_THREADS": "1"}}


def run(command, newcomer):
    child = subprocess.run(command, capture_output=True, text=True, timeout=100, **newcomer)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_the_python_is_one_script_that_runs(newcomer):
    pytest.importorskip("prometheus_client")
    pytest.importorskip("tensorboard")
    script = newcomer["cwd"] / "page.py"
    script.write_text("\n".join(blocks("python")))
    shown = run([sys.executable, "-W", "error::RuntimeWarning", script], newcomer)
    for expected in ("def read(", "'disk': ", "slots are filled", "hits ", "moe_gpu_"):
        assert expected in shown
    assert (newcomer["cwd"] / "hot.safetensors").is_file()
    assert list((newcomer["cwd"] / "runs").iterdir())


def test_the_commands_run(newcomer):
    (block,) = blocks("bash")
    (command,) = block.splitlines()
    program, *arguments = command.split()
    assert program == "python"
    assert "expert slots" in run([sys.executable, *arguments], newcomer)


def test_the_budgets_are_arguments():
    known = (
        inspect.signature(moe_gpu.load).parameters | inspect.signature(moe_gpu.attach).parameters
    )
    named = re.findall(r"`(\w+)`", " ".join(rows("Budgets")))
    assert len(named) == 8 and set(named) <= set(known)
    assert set(re.findall(r"`(\w+)=", TEXT)) <= set(known)


def test_the_errors_are_raised():
    """Each part of a quoted sentence stands in the source."""
    source = " ".join(path.read_text() for path in sorted((ROOT / "moe_gpu").rglob("*.py")))
    source = re.sub(r'"\s+f?"', "", source)  # sentences that were broken over lines
    quoted = rows("When something fails")
    assert len(quoted) > 10
    for sentence in quoted:
        for part in sentence.strip("`").split(" ... "):
            assert part in source, part


def test_the_links_lead_somewhere():
    headings = re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        assert link in anchors or (PAGE.parent / link).is_file(), link
    for path in re.findall(r"`(\w+/[\w/]+\.\w+)`", TEXT):
        assert (ROOT / path).is_file(), path


def test_lines_are_as_long_as_elsewhere():
    prose = [line for line in TEXT.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100


def test_the_quality_page():
    """Its commands are the README's, which run; what it names exists."""
    page = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert all(command in readme for command in block.splitlines())
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / link).resolve().is_file(), link
    known = inspect.signature(moe_gpu.attach).parameters
    assert set(re.findall(r"`(?:attach\(\.\.\., )?(\w+)=", page)) <= set(known)
