"""A pytest plugin that writes each result as it comes, so that a run cut short is not lost.

``pytest -p _test_report``, with this folder on the path; the file is ``$MOE_GPU_TEST_REPORT``, one
JSON object a line. What only a GPU can tell runs first, then what launches kernels, then the rest.
"""

import json
import os

import pytest

# files whose tests compile kernels, or move experts to a device
FIRST = tuple(
    f"test_{name}.py"
    for name in (
        "route_kernel", "control_kernel", "scores", "meters", "gate", "statistics", "compile",
        "exact", "transfer", "offloader", "tiers", "store", "record", "attach", "all_resident",
        "faults", "pager", "residency", "prefetch", "under_way", "audit", "control", "export",
    )
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    """Sort the tests."""
    order = {name: number for number, name in enumerate(FIRST)}
    items.sort(
        key=lambda item: (
            item.get_closest_marker("gpu") is None, order.get(item.path.name, len(FIRST))
        )
    )  # fmt: skip


def pytest_collection_finish(session) -> None:
    """Write how many tests there are."""
    if session.items:  # not where workers collect
        write({"collected": len(session.items)})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids) -> None:
    """Write how many tests a worker found."""
    write({"collected": len(ids)})


def pytest_runtest_logreport(report) -> None:
    """Write one result: what ran, and what failed or was skipped before or after it ran."""
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome != "passed":
        line["why"] = why(report)
    write(line)


def write(line: dict) -> None:
    """Add a line to the report."""
    path = os.environ.get("MOE_GPU_TEST_REPORT")
    # a worker's reports come again where they are gathered
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def why(report) -> str:
    """Return the first line of what went wrong, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):  # of a skip: path, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (crash.message if crash else str(report.longrepr or "")).strip()
    return text.splitlines()[0][:300] if text else ""
