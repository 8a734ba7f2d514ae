"""A pytest plugin that writes each result as it comes, so that a run cut short is not lost.

``pytest -p _test_report``, with this folder on the path; the file is ``$MOE_GPU_TEST_REPORT``, one
JSON object a line.
"""

import json
import os


def pytest_runtest_logreport(report) -> None:
    """Write one result: what ran, and what failed or was skipped before or after it ran."""
    path = os.environ.get("MOE_GPU_TEST_REPORT")
    is_worker = (
        "PYTEST_XDIST_WORKER" in os.environ
    )  # its reports come again where they are gathered
    if path is None or is_worker or (report.when != "call" and report.outcome == "passed"):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome != "passed":
        line["why"] = why(report)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def why(report) -> str:
    """Return the first line of what went wrong, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):  # of a skip: path, line, reason
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (crash.message if crash else str(report.longrepr or "")).strip()
    return text.splitlines()[0][:300] if text else ""
