"""TensorBoard with its PyTorch profiler plugin, started for a folder of traces and asked over HTTP."""

import contextlib
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PLUGIN = "data/plugin/pytorch_profiler"


class Plugin:
    """The plugin of a running TensorBoard.

    Attributes:
        url: Where its routes are.
        runs: Names of the traces' folders.
    """

    def __init__(self, url: str):
        self.url, self.runs = url, []

    def get(self, route: str, **query: str) -> bytes:
        """Return what a route answers; see ``get_plugin_apps`` of the plugin for their names."""
        url = f"{self.url}/{route}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            body = answer.read()
            is_packed = answer.headers.get("Content-Encoding") == "gzip"
        return gzip.decompress(body) if is_packed else body

    def get_json(self, route: str, **query: str) -> object:
        """Return what a route answers, parsed."""
        return json.loads(self.get(route, **query))

    def of_run(self, run: str) -> dict[str, str]:
        """Return the query that names the first trace of a run."""
        worker = self.get_json("workers", run=run, view="Overview")[0]
        span = self.get_json("spans", run=run, worker=worker)[0]
        return {"run": run, "worker": worker, "span": span}


@contextlib.contextmanager
def serving(folder: Path, timeout_s: float = 60.0) -> Iterator[Plugin]:
    """Serve the traces below ``folder`` on this machine only, and end the server on leaving.

    Args:
        folder: TensorBoard's ``--logdir``.
        timeout_s: Bound of the wait until every trace is loaded.

    Yields:
        The plugin.

    Raises:
        RuntimeError: There is no trace, or the server ended, or did not load every trace in time;
            with its last words.
    """
    runs = {path.parent for path in folder.rglob("*.pt.trace.json*")}
    if not runs:
        raise RuntimeError(f"no trace below {folder}")
    deadline = time.monotonic() + timeout_s
    command = [sys.executable, "-m", "tensorboard.main", "--load_fast=false"]
    command += ["--host", "127.0.0.1", "--port", "0", "--logdir", str(folder)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _loaded(server, log, len(runs), deadline)
        finally:
            server.kill()
            server.wait()


def _loaded(server, log, runs: int, deadline: float) -> Plugin:
    plugin = None
    while time.monotonic() < deadline and server.poll() is None:
        log.seek(0)
        found = re.search(r"at (http://127\.0\.0\.1:\d+)/", log.read())
        if found and plugin is None:
            plugin = Plugin(f"{found[1]}/{PLUGIN}")
        if plugin is not None:
            with contextlib.suppress(urllib.error.URLError):  # not listening yet
                # it says that it loads nothing also before it has begun to
                plugin.runs = plugin.get_json("runs")["runs"]
                if len(plugin.runs) == runs:
                    return plugin
        time.sleep(0.2)
    log.seek(0)
    why = "ended" if server.poll() is not None else "did not load every trace in time"
    raise RuntimeError(f"TensorBoard {why}: {log.read()[-500:]}")
