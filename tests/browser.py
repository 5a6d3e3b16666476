"""A headless Chromium for the tests of the pages: opened at the sizes of a desk and of a phone, light and dark, with
everything that the console said. Without a Chromium, or without playwright, those tests are left out: `make test-pages`
installs both.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:  # the extra `pages`
    sync_playwright = None

NAMES = ("chromium", "chromium-browser", "google-chrome")
# nothing of its own over the network; no sandbox, which root and containers do not have
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")  # fmt: skip
DESK, PHONE = (1280, 800), (390, 844)  # CSS pixels, width and height


def chromium() -> str | None:
    """The program, or None."""
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


needs_browser = pytest.mark.skipif(
    sync_playwright is None or chromium() is None, reason="no Chromium or no playwright: `make test-pages` has both"
)


class Opened:
    """A page, and what went wrong in it."""

    def __init__(self, page: "Page"):
        self.page, self.told, self.asked = page, [], []
        page.on("console", lambda message: message.type in ("error", "warning") and self.told.append(message.text))
        page.on("pageerror", lambda error: self.told.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def elsewhere(self) -> list[str]:
        """URLs that were asked for on other hosts than this one."""
        own = ("file:", "data:", "blob:", "about:", "http://127.0.0.1", "http://localhost", "ws://127.0.0.1")
        return [url for url in self.asked if not url.startswith(own)]

    def screenshot(self, path: Path | None = None, **how: Any) -> np.ndarray:
        """Pixels uint8 [H, W, 3] of what is seen, or of the whole page with full_page=True."""
        data = self.page.screenshot(**how)
        if path:
            path.write_bytes(data)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def colours(pixels: np.ndarray) -> int:
    """Different colours, each channel in 32 steps: an empty page has one or two."""
    return len(np.unique((pixels // 8).reshape(-1, 3), axis=0))


def brightness(pixels: np.ndarray) -> float:
    """Mean of all channels, 0..1: below 0.5 a page is dark."""
    return float(pixels.mean() / 255)


@contextlib.contextmanager
def launched() -> "Iterator[Browser]":
    """The browser, closed at the end."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=[*QUIET])
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """One Chromium for the pages of a module."""
    with launched() as found:
        yield found


@contextlib.contextmanager
def opened(
    browser: "Browser", url: str, size: tuple[int, int] = DESK, dark: bool = False, online: bool = True
) -> Iterator[Opened]:
    """A page in a profile of its own. online: whether it may ask the network at all."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=not online, accept_downloads=True
    )
    try:
        found = Opened(context.new_page())
        found.page.set_default_timeout(20_000)
        found.page.goto(url)
        yield found
    finally:
        context.close()
