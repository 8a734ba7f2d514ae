"""A picture of a trace as TensorBoard's trace view shows it, taken by a headless Chromium.

Usage:
    python profiling/screenshot.py profiling/out/trace_decode --run eager --out trace.png

The plugin's page loads webcomponents.min.js 0.7.24 from the internet; where the browser has none,
``--polyfill`` gives it the file (of the npm package webcomponents.js). The picture shows one
occurrence of a range, ``--range``, with what is around it.
"""

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _tensorboard import Plugin, serving

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 60.0
# the page is its own parent here, and would take what it tells that one for a trace
NO_ECHO = """
addEventListener('message', event => {
  if (event.data && event.data.msg === 'ready') { event.stopImmediatePropagation(); ready(); }
});
window.isReady = new Promise(resolve => { window.ready = resolve; });
"""
LOAD = """
isReady.then(() => fetch(%s)).then(answer => answer.text()).then(text => {
  postMessage({name: %s, data: text}, '*');
  return new Promise(resolve => {
    const viewer = document.getElementById('trace-viewer');
    const poll = () => viewer.model ? setTimeout(resolve, 1000) : setTimeout(poll, 100);
    poll();
  });
})
"""
ZOOM = """
(() => {
  const viewer = document.getElementById('trace-viewer'), view = viewer.trackView;
  const found = [...viewer.model.getDescendantEvents()].filter(slice => slice.title === %s);
  found.sort((a, b) => a.start - b.start);
  const slice = found[%d];
  if (!slice) return false;
  const margin = %f * slice.duration, transform = view.viewport.currentDisplayTransform.clone();
  transform.xSetWorldBounds(slice.start - margin, slice.end + margin, view.viewWidth_);
  view.viewport.setDisplayTransformImmediately(transform);
  viewer.brushingStateController.changeSelectionFromTimeline(new tr.model.EventSet([slice]));
  return new Promise(resolve => setTimeout(() => resolve(true), 1000));
})()
"""


class Browser:
    """A headless Chromium, told what to do through pipes (its ``--remote-debugging-pipe``).

    Args:
        program: Path of the browser.
        profile: Empty folder for its files.
    """

    def __init__(self, program: str, profile: Path):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        options = "--headless=new --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        # it reads its descriptor 3 and writes to 4
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["sh", "-c", shell, program, *options.split(), f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._sent, self._session = b"", 0, {}
        self._deadline = time.monotonic() + TIMEOUT_S
        self.substitutes: dict[str, bytes] = {}  # bodies by end of address

    def open(self, url: str, width: int, height: int) -> None:
        """Open a page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        if self.substitutes:
            patterns = [{"urlPattern": f"*{end}"} for end in self.substitutes]
            self.call("Fetch.enable", patterns=patterns)
        self.call("Page.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=NO_ECHO)
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> object:
        """Return the value of a script, or of the promise it makes."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"the page: {json.dumps(answer['exceptionDetails'])[:500]}")
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """Return the page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def call(self, method: str, **parameters: object) -> dict:
        """Send a command of the DevTools protocol and return its result."""
        number = self._send(method, parameters)
        while True:
            message = self._receive()
            if message.get("method") == "Fetch.requestPaused":
                self._substitute(message["params"])
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def _substitute(self, paused: dict) -> None:
        url = paused["request"]["url"]
        body = next(body for end, body in self.substitutes.items() if url.endswith(end))
        answer = {"requestId": paused["requestId"], "responseCode": 200}
        self._send("Fetch.fulfillRequest", answer | {"body": base64.b64encode(body).decode()})

    def _send(self, method: str, parameters: dict) -> int:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters} | self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        return self._sent

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            left_s = self._deadline - time.monotonic()
            if not select.select([self._in], [], [], max(0.0, left_s))[0]:
                raise RuntimeError(
                    f"no answer of the browser within {TIMEOUT_S:g} s (no network? see --polyfill)"
                )
            read = os.read(self._in, 1 << 20)
            if not read:
                raise RuntimeError("the browser ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """Start whatever Chromium is installed; end it on leaving."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise SystemExit(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, Path(profile))
        try:
            yield browser
        finally:
            browser.close()


def picture(plugin: Plugin, options: argparse.Namespace) -> bytes:
    """Return the trace view of a run as PNG."""
    with browsing() as browser:
        if options.polyfill is not None:
            browser.substitutes["/webcomponents.min.js"] = options.polyfill.read_bytes()
        browser.open(f"{plugin.url}/trace_embedding.html", options.width, options.height)
        query = "&".join(f"{key}={value}" for key, value in plugin.of_run(options.run).items())
        browser.evaluate(LOAD % (json.dumps(f"trace?{query}"), json.dumps(options.run)))
        if not browser.evaluate(ZOOM % (json.dumps(options.range), options.nth, options.margin)):
            raise SystemExit(f"no {options.range} number {options.nth} in {options.run}")
        return browser.picture()


def main() -> None:
    """Take the picture and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the --out of a trace script")
    parser.add_argument("--run", default="eager")
    parser.add_argument("--range", default="moe_gpu::token", help="what to zoom to")
    parser.add_argument("--nth", type=int, default=0, help="which occurrence of it, from 0")
    parser.add_argument("--margin", type=float, default=0.02, help="beside it, in its lengths")
    parser.add_argument("--polyfill", type=Path, help="webcomponents.min.js, without a network")
    parser.add_argument("--width", type=int, default=1700)
    parser.add_argument("--height", type=int, default=590)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with serving(options.folder) as plugin:
        if options.run not in plugin.runs:
            raise SystemExit(f"no run {options.run!r} there, only {', '.join(plugin.runs)}")
        options.out.write_bytes(picture(plugin, options))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
