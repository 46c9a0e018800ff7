"""A headless Chromium with one page, driven by Playwright. Whatever the page loads or logs is recorded."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page, sync_playwright

_LIMIT_MS = 60_000.0  # for one answer, on a busy machine
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = ("--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-proxy-server")


def find() -> str | None:
    """Return the path of an installed Chromium, or None. Playwright's own download is not used."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One page of a browser."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.requests: list[str] = []  # in order, with those that the page's policy blocked
        self._blocked: set[str] = set()
        self.complaints: list[str] = []
        page.set_default_timeout(_LIMIT_MS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: request.failure == "csp" and self._blocked.add(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        """Show a file in a window of this width; forget the requests of earlier pages."""
        self._page.set_viewport_size({"width": width, "height": 900})
        self._page.emulate_media(color_scheme="dark" if dark else "light")
        self.requests, self._blocked, self.complaints = [], set(), []
        self._page.goto(path.as_uri())
        self.run("document.fonts.ready.then(() => 1)")

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page, whatever its policy, and return its plain value."""
        return self._page.evaluate(expression)

    def picture(self) -> NDArray[np.uint8]:
        """Return the whole page as it is drawn, [height, width, 3]."""
        with Image.open(io.BytesIO(self._page.screenshot(full_page=True))) as picture:
            return np.asarray(picture.convert("RGB"))

    def sent(self) -> list[str]:
        """Return the requests that were sent, without those that the page's policy blocked."""
        return [url for url in self.requests if url not in self._blocked]

    def settle(self) -> None:
        """Wait for what the page does on its own, so that late requests are recorded too."""
        self._page.wait_for_timeout(200)


@contextmanager
def started(program: str) -> Iterator[Browser]:
    """Start this Chromium and open a page in it."""
    with sync_playwright() as playwright:
        # Containers and root have no sandbox.
        chromium = playwright.chromium.launch(
            executable_path=program, args=_FLAGS, chromium_sandbox=False, timeout=_LIMIT_MS
        )
        try:
            yield Browser(chromium.new_page())
        finally:
            chromium.close()
