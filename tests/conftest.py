"""What every test stands on: where kernels run, poisoned memory, which tests are left out."""

import os

import torch

# Must precede any kernel import: Triton reads the variable when it decorates a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# deterministic mode asks cuBLAS for a fixed workspace; read when its first handle is made
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# nothing here may reach for the network, nor any process that a test starts
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores; more threads than cores slow all of them down
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

import pytest  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np

    try:
        from triton.runtime.interpreter import InterpreterBuilder
    except ModuleNotFoundError:
        pass
    else:
        # as on a GPU, of a NaN and a number the number: up to 3.8 the interpreter gives the NaN
        InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
        InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def one_thread():
    """For tiny tensors, whose threads only wait for each other, and for a forked child, which has none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Fix the seed, and fill torch.empty with NaN / INT_MAX so that an unwritten output shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned_only)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        slow = [item for item in items if "slow" in item.keywords]
        items[:] = [item for item in items if "slow" not in item.keywords]
        config.hook.pytest_deselected(items=slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
