"""Drives Debian's chromium, headless, as a user would; through its pipe for developers' tools."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest


def chromium() -> str:
    """The browser's program; the test is skipped where there is none."""
    names = ("chromium", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no chromium (Debian: apt-get install chromium)")
    return found


class Browser:
    """One tab. Keeps what went wrong in it, and what it asked for.

    Args:
        folder: for the profile.
        width: of the window, in pixels.
        height: likewise.
        dark: whether the page is told that the user likes dark colours.

    Attributes:
        errors: what the console reports: exceptions, errors, and what was blocked.
        requests: addresses that were asked for.
    """

    def __init__(self, folder: Path, width: int = 1100, height: int = 900, dark: bool = False):
        to_child, commands = os.pipe()
        answers, from_child = os.pipe()
        self._commands, self._answers = commands, answers
        # the browser reads descriptor 3 and writes to 4
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_child, from_child)]

        def connect() -> None:
            for number, end in zip((3, 4), high, strict=True):
                os.dup2(end, number)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
        flags += [f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}"]
        self._process = subprocess.Popen(
            [chromium(), *flags, "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_child, from_child, *high):
            os.close(end)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        tab = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.resize(width, height)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the developers' protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self, timeout: float = 120.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], timeout)
            assert ready, "the browser does not answer"
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(str(details.get("exception", details).get("description", details)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a)) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, address: str) -> None:
        """Go to an address."""
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.send(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, f"{code}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait(self, code: str, seconds: float = 180.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({code})"):
            assert time.monotonic() < end, f"waited in vain for {code}; errors: {self.errors}"
            time.sleep(0.1)

    def click(self, selector: str) -> None:
        """Click on the first element that fits."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, as typing does."""
        self.run(f"""(() => {{
          const field = document.querySelector({json.dumps(selector)});
          const kind = Object.getPrototypeOf(field);
          Object.getOwnPropertyDescriptor(kind, "value").set.call(field, {json.dumps(text)});
          for (const name of ["input", "change", "blur"])
            field.dispatchEvent(new Event(name, {{bubbles: true}}));
        }})()""")

    def key(self, name: str, control: bool = False) -> None:
        """Press a key."""
        codes = {"key": name, "code": name, "modifiers": 2 if control else 0}
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, **codes)

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place of an element and let it go at another, as shares of it."""
        node = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{node}.scrollIntoView({{block: 'center'}})")
        frame = self.run(
            f"(() => {{ const r = {node}.getBoundingClientRect();"
            " return [r.left, r.top, r.width, r.height]; })()"
        )
        for kind, (x, y) in (("Pressed", start), ("Moved", end), ("Released", end)):
            place = {"x": frame[0] + x * frame[2], "y": frame[1] + y * frame[3]}
            self.send(
                "Input.dispatchMouseEvent",
                **{"type": f"mouse{kind}", "button": "left", "buttons": 1, "clickCount": 1},
                **place,
            )

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to a file field."""
        document = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def resize(self, width: int, height: int) -> None:
        """Give the window a size."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
        )

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save a PNG of the window, or of the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
