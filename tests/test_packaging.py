"""What installs: moe_gpu and nothing else, from a wheel and from an editable tree."""

import ast
import os
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent

# what imports in a child comes from one place: no editable install of this tree may answer first
ONLY_FROM = """
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {folder!r})
site.addsitedir({folder!r})
"""
SHOW = "import moe_gpu, moe_gpu.kernels.route as r; print(moe_gpu.__file__, r.__file__, sep='\\n')"


def run(*command, cwd):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    child = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert child.returncode == 0, f"{command}\n{child.stdout}\n{child.stderr}"
    return child.stdout


def run_python(folder, script, cwd):
    return run(sys.executable, "-c", ONLY_FROM.format(folder=str(folder)) + script, cwd=cwd)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what packaging can see: setuptools writes into the tree that it builds."""
    tree = tmp_path_factory.mktemp("tree")
    names = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
    for folder in ("moe_gpu", "kernels", "tests", "profiling", "examples"):
        names += [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")]
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, tree, cwd=out)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def modules(folder, package):
    files = (ROOT / folder).rglob("*.py")
    return {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}


def test_wheel_holds_moe_gpu_and_its_metadata_only(wheel):
    version = setup_keyword("version")
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"moe_gpu", f"moe_gpu-{version}.dist-info"}
    assert wheel.read(f"moe_gpu-{version}.dist-info/top_level.txt").split() == [b"moe_gpu"]


def test_wheel_holds_every_module(wheel):
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    assert packed == modules("moe_gpu", "moe_gpu") | modules("kernels", "moe_gpu/kernels")


def test_wheel_carries_the_license(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    assert "The moe-gpu authors" in wheel.read(name).decode()


def test_wheel_imports(wheel, tmp_path):
    wheel.extractall(tmp_path)
    files = run_python(tmp_path, SHOW, cwd=tmp_path).split()
    want = ["moe_gpu/__init__.py", "moe_gpu/kernels/route.py"]
    assert files == [str(tmp_path / name) for name in want]


def test_wheel_installs_the_command(wheel, tmp_path):
    version = setup_keyword("version")
    wheel.extractall(tmp_path)
    (command,) = Distribution.at(tmp_path / f"moe_gpu-{version}.dist-info").entry_points
    assert (command.group, command.name) == ("console_scripts", "moe-gpu")
    # what pip writes into bin/
    script = (
        "import sys; sys.argv = ['moe-gpu', 'plan', '--help']\n"
        f"from {command.module} import {command.attr}; sys.exit({command.attr}())"
    )
    shown = run_python(tmp_path, script, cwd=tmp_path)
    assert shown.startswith("usage: moe-gpu plan ")


def test_editable_install_imports(tree, tmp_path):
    script = (
        f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    )
    name = run(sys.executable, "-c", script, cwd=tree).splitlines()[-1]
    zipfile.ZipFile(tmp_path / name).extractall(tmp_path)
    files = run_python(tmp_path, SHOW, cwd=tmp_path).split()
    assert files == [str(tree / name) for name in ("moe_gpu/__init__.py", "kernels/route.py")]
    script = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    assert str(tree) not in run_python(tmp_path, script, cwd=tmp_path)


def test_this_environment_imports_kernels_as_part_of_moe_gpu(tmp_path):
    script = "import moe_gpu.kernels, sys; print('kernels' in sys.modules)"
    assert run(sys.executable, "-c", script, cwd=tmp_path).strip() == "False"


def test_version_is_the_same_in_both_places():
    import moe_gpu

    assert moe_gpu.__version__ == setup_keyword("version")


def test_constraints_satisfy_the_ranges():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    for text in setup_keyword("install_requires") + all_extras():
        wanted = Requirement(text)
        pinned = pins.get(canonicalize_name(wanted.name))
        assert pinned is not None, f"{text} has no pin in constraints.txt"
        assert wanted.specifier.contains(pinned), f"{text}, but constraints.txt pins {pinned}"


def test_lower_bounds_are_the_promised_ones():
    wanted = map(Requirement, setup_keyword("install_requires") + all_extras())
    bounds = {w.name: str(w.specifier) for w in wanted}
    assert bounds["torch"] == ">=2.11" and bounds["triton"] == ">=3.6"
    assert bounds["transformers"] == ">=5.17"
    assert setup_keyword("python_requires") == ">=3.11"


def test_other_transformers_are_the_oldest_allowed_and_a_newer_one():
    def pinned(name):
        lines = (ROOT / name).read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("transformers==")]
        return Version(line.removeprefix("transformers=="))

    oldest, own, newest = (
        pinned(f"constraints{which}.txt") for which in ("-oldest", "", "-newest")
    )
    (wanted,) = {text for text in all_extras() if text.startswith("transformers")}
    assert wanted == f"transformers>={oldest.major}.{oldest.minor}"
    assert oldest < own <= newest


def test_nothing_is_pinned_twice():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [canonicalize_name(line.split("==")[0]) for line in lines if "==" in line]
    assert len(names) == len(set(names))


def all_extras():
    return [text for extra in setup_keyword("extras_require").values() for text in extra]


def setup_keyword(name):
    tree = ast.parse((ROOT / "setup.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "setup"]
    return next(ast.literal_eval(k.value) for k in call.keywords if k.arg == name)
