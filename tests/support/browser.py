"""A real browser for tests of HTML pages: the system's Chromium, headless, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WAIT_MS = 120_000  # timeout for page content: a busy machine takes long
DESKTOP, PHONE = (1280, 900), (390, 844)


def find_browser() -> str:
    """Return the path of the browser, or skip the test if there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(NAMES)}); on Debian: apt-get install chromium")
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's Chromium; skips the test if either is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
    )
    path = find_browser()
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watched:
    """A page, with the errors, dialogs and requests that occurred while it was open."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def expect_quiet(self, *allowed: str) -> None:
        """Require no message, no dialog, and no request except to these addresses."""
        assert self.messages == []
        assert [url for url in self.requests if not url.startswith(allowed)] == []

    def keep_screenshot(self, name: str) -> None:
        """Save a screenshot as build/screenshots/NAME.png, which git ignores."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SCREENSHOTS / f"{name}.png"))


@contextmanager
def opened(browser: Any, address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Iterator[Watched]:
    """Open a new page that is watched from before it loads."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    watched = Watched(page)
    page.on("console", lambda message: watched.messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: watched.messages.append(f"error: {error}"))
    page.on("request", lambda request: watched.requests.append(request.url))

    def dismiss(dialog: Any) -> None:
        watched.messages.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("dialog", dismiss)
    try:
        page.goto(address)
        yield watched
    finally:
        context.close()
