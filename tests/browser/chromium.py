"""A headless Chromium without a driver: commands and events as JSON through two pipes (--remote-debugging-pipe)."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_LIMIT_S = 60.0  # for one answer, on a busy machine
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # which a container or root does not have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--no-proxy-server",
    "--remote-debugging-pipe",
)


def find() -> str | None:
    """Return the program; None: there is none here."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def _high(descriptor: int) -> int:
    """Move a descriptor out of the way of the two numbers that the browser uses."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


class Browser:
    """One browser with one page. Whatever it wants to load or complains about is kept."""

    def __init__(self, program: str, folder: Path) -> None:
        theirs_in, self._to = map(_high, os.pipe())
        self._from, theirs_out = map(_high, os.pipe())
        flags = [*_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *flags],
            pass_fds=(theirs_in, theirs_out),
            env=os.environ | {"HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number, self._session = b"", 0, ""
        self._answers: dict[int, dict[str, Any]] = {}
        self._asked: list[tuple[str, str]] = []
        self._blocked: set[str] = set()
        self.complaints: list[str] = []
        self._loaded = False
        page = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to)  # which ends it
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)

    @property
    def requests(self) -> list[str]:
        """What the page wanted, in order; what its policy kept from being asked is among it."""
        return [url for _, url in self._asked]

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        """Show a file in a window of this width; forget what earlier pages asked for."""
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])
        self._asked, self._blocked, self.complaints, self._loaded = [], set(), [], False
        self._send("Page.navigate", url=path.as_uri())
        self._wait(lambda: self._loaded)
        self.run("document.fonts.ready.then(() => 1)")

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page, whatever its policy, and return its plain value."""
        found = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> NDArray[np.uint8]:
        """Return the whole page as it is drawn, [height, width, 3]."""
        shot = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as picture:
            return np.asarray(picture.convert("RGB"))

    def sent(self) -> list[str]:
        """Return what was really asked for, not what the page's policy kept from being asked."""
        return [url for number, url in self._asked if number not in self._blocked]

    def settle(self) -> None:
        """Let the page do what it does on its own, so that late requests are noticed too."""
        self.run("new Promise(done => setTimeout(done, 200))")

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        self._wait(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _wait(self, done: Callable[[], bool]) -> None:
        due = time.monotonic() + _LIMIT_S
        while not done():
            ready, _, _ = select.select([self._from], [], [], max(0.0, due - time.monotonic()))
            assert ready, "the browser does not answer"
            read = os.read(self._from, 1 << 20)
            assert read, f"the browser ended with {self._process.wait(10)}"
            *messages, self._buffer = (self._buffer + read).split(b"\0")
            for message in messages:
                self._hear(json.loads(message))

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = dict(message)
        elif message["method"] == "Network.requestWillBeSent":
            self._asked.append((message["params"]["requestId"], message["params"]["request"]["url"]))
        elif message["method"] == "Network.loadingFailed":
            if "blockedReason" in message["params"]:
                self._blocked.add(message["params"]["requestId"])
        elif message["method"] == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
        elif message["method"] == "Runtime.consoleAPICalled":
            self.complaints.append(str(message["params"]["args"]))
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(message["params"]["exceptionDetails"]["text"])
        elif message["method"] == "Page.loadEventFired":
            self._loaded = True
