"""A headless Chromium, driven over a pipe by its own protocol (DevTools); nothing but the browser is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """One browser with one page: the requests that it makes are in `requests`, what goes wrong in `complaints`."""

    def __init__(self, folder: Path) -> None:
        self._out, theirs_write = os.pipe()
        theirs_read, self._in = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --no-first-run "
            "--disable-background-networking --disable-extensions --disable-component-update --disable-sync "
            "--force-color-profile=srgb --hide-scrollbars"
        )
        # It listens at 3 and answers at 4; these may be taken here, so that the ends are moved out of the way first.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_read, theirs_write)]
        nowhere = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        self._process = os.posix_spawn(
            str(BINARY),
            [str(BINARY), *options.split(), f"--user-data-dir={folder}", "about:blank"],
            os.environ,
            file_actions=[nowhere, *((os.POSIX_SPAWN_DUP2, end, at) for end, at in zip(ends, (3, 4), strict=True))],
        )
        for end in (theirs_read, theirs_write, *ends):
            os.close(end)
        self._number, self._waiting, self._buffer = 0, [], b""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        targets = self._call("Target.getTargets", session=None)["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self._call("Target.attachToTarget", session=None, targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    # -- the protocol

    def call(self, method: str, **values: Any) -> Any:
        return self._call(method, session=self._session, **values)

    def _call(self, method: str, session: str | None, **values: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if session is not None:
            message["sessionId"] = session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next(300)
            if got.get("id") == self._number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]
            self._take(got)

    def _next(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], max(until - time.monotonic(), 0))
            if not ready:
                raise TimeoutError("Chromium says nothing")
            part = os.read(self._out, 1 << 20)
            if not part:
                raise RuntimeError("Chromium went away")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def _take(self, got: dict[str, Any]) -> None:
        method, values = got.get("method"), got.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.complaints.append(values["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(values["exceptionDetails"]))
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {values.get('message')}")
            self._number += 1
            message = {"id": self._number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            os.write(self._in, json.dumps(message | {"sessionId": self._session}).encode() + b"\0")
        self._waiting.append(method)

    # -- a person at it

    def open(self, address: str) -> None:
        """Goes there, and waits until it is loaded."""
        self._waiting.clear()
        done = self.call("Page.navigate", url=address)
        if "errorText" in done:
            raise RuntimeError(f"{address}: {done['errorText']}")
        self.wait_loaded()

    def wait_loaded(self) -> None:
        until = time.monotonic() + 300
        while "Page.loadEventFired" not in self._waiting:
            self._take(self._next(until - time.monotonic()))
        self._waiting.clear()

    def run(self, script: str) -> Any:
        """What a script gives; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"]))
        return done["result"].get("value")

    def until(self, script: str, seconds: float = 200) -> None:
        """Waits until a script gives something true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(script)
            time.sleep(0.03)

    def key(self, key: str, code: str, number: int, text: str = "", modifiers: int = 0) -> None:
        """Presses a key."""
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screen(self, width: int, height: int, dark: bool = False) -> None:
        """A window's size, and whether its user likes it dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path, whole: bool = False) -> None:
        """Saves what is seen, or all of the page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def first_paint(self) -> float:
        """Milliseconds from going there to the first contentful paint."""
        return float(
            self.run(
                "new Promise(done => new PerformanceObserver(l => l.getEntriesByName('first-contentful-paint')"
                ".forEach(e => done(e.startTime))).observe({type: 'paint', buffered: true}))"
            )
        )

    def close(self) -> None:
        try:
            self._call("Browser.close", session=None)
        except (RuntimeError, OSError, TimeoutError):
            os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._in)
        os.close(self._out)
