"""docs/: every page's code runs, and what it names exists."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_gpu
from zoo import ROWS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXT = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}

# what each page's script must have printed; a page without Python is not among them
SHOWN = {
    "larger_than_the_gpu": ("def read(", "'disk': ", "slots are filled", "hits ", "moe_gpu_"),
    "plain_pytorch": ("policy=QualityBudget(", "pairs were resident", "mode='hit_rate'"),
    "several_gpus": ("cpu [0, 1, 2, 3]",),
    "training": ("step 4: loss 0.", "hit rate 100%", "slots 16/16"),
    "transformers": ("4 of 8 experts resident per layer", " swaps, hit rate", "4 real tokens of 6"),
}


def blocks(page, language):
    fenced = re.compile(rf"^```{language}\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    return fenced.findall(TEXT[page])


def rows(page, heading, cell=0):
    """A cell of each row of the table under a heading."""
    section = TEXT[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line.strip("| ") for line in section.splitlines() if line.startswith("| ")]
    return [line.split(" | ")[cell] for line in table[2:]]


def anchors(page):
    headings = re.findall(r"^## (.*)$", TEXT[page], flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


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


@pytest.mark.parametrize("page", SHOWN)
def test_the_python_is_one_script_that_runs(page, newcomer):
    if page == "larger_than_the_gpu":
        pytest.importorskip("prometheus_client")
        pytest.importorskip("tensorboard")
    script = newcomer["cwd"] / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    shown = run([sys.executable, "-W", "error::RuntimeWarning", script], newcomer)
    for expected in SHOWN[page]:
        assert expected in shown
    if page == "larger_than_the_gpu":
        assert (newcomer["cwd"] / "hot.safetensors").is_file()
        assert list((newcomer["cwd"] / "runs").iterdir())


def test_no_page_has_python_that_is_not_run():
    assert {page for page in TEXT if blocks(page, "python")} == set(SHOWN)


def test_the_commands_run(newcomer):
    (block,) = blocks("larger_than_the_gpu", "bash")
    (command,) = block.splitlines()
    program, *arguments = command.split()
    assert program == "python"
    assert "expert slots" in run([sys.executable, *arguments], newcomer)


def test_the_budgets_are_arguments():
    named = re.findall(r"`(\w+)`", " ".join(rows("larger_than_the_gpu", "Budgets")))
    assert len(named) == 8 and set(named) <= ARGUMENTS["larger_than_the_gpu"]


OF_ATTACH = {*inspect.signature(moe_gpu.attach).parameters}
OF_LOAD = {*inspect.signature(moe_gpu.load).parameters}
OF_GATE = {*inspect.signature(moe_gpu.MoEGate).parameters}
ARGUMENTS = {
    "larger_than_the_gpu": OF_ATTACH | OF_LOAD,
    "plain_pytorch": OF_GATE | {"strict", "find_unused_parameters"},
    "quality": OF_ATTACH,
    "several_gpus": OF_ATTACH | OF_LOAD | OF_GATE,
    "training": OF_ATTACH | OF_GATE | {"output_router_logits"},
    "transformers": OF_ATTACH,
}


@pytest.mark.parametrize("page", TEXT)
def test_what_is_written_as_an_argument_is_one(page):
    named = re.findall(r"`(?:attach\(\.\.\., )?(\w+)=", TEXT[page])
    assert set(named) <= ARGUMENTS[page]


@pytest.mark.parametrize(
    "page, heading",
    [("larger_than_the_gpu", "When something fails"), ("transformers", "What is refused")],
    ids=["larger_than_the_gpu", "transformers"],
)
def test_the_errors_are_raised(page, heading):
    """Each part of a quoted sentence stands in the source."""
    source = " ".join(path.read_text() for path in sorted((ROOT / "moe_gpu").rglob("*.py")))
    source = re.sub(r'"\s+f?"', "", source)  # sentences that were broken over lines
    quoted = rows(page, heading)
    assert len(quoted) > 10
    for sentence in quoted:
        for part in sentence.strip("`").split(" ... "):
            assert part in source, part


def test_the_families_are_those_of_the_zoo():
    types = re.findall(r"`(\w+)`", " ".join(rows("transformers", "Families", cell=1)))
    assert sorted(types) == sorted(family.name for family in ROWS)


@pytest.mark.parametrize("page", TEXT)
def test_the_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        path, _, anchor = link.partition("#")
        if path:
            assert (DOCS / path).is_file(), link
        if anchor:
            assert anchor in anchors(Path(path).stem if path else page), link
    for path in re.findall(r"`(\w+/[\w/]+\.\w+)`", prose):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", sorted(TEXT.keys() - {"quality"}))
def test_lines_are_as_long_as_elsewhere(page):
    prose = [line for line in TEXT[page].splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100


def test_the_readme_lists_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES if f"docs/{page.name}" not in readme]


def test_the_commands_of_the_quality_page_are_the_readmes():
    """The README's commands run, see there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = blocks("quality", "bash")
    assert all(command in readme for command in block.splitlines())
