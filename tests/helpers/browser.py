"""Pages in a real headless Chromium: Debian's, driven by playwright."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Debian's package chromium and Python's package playwright",
)

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-pings",
]
"""No sandbox: containers seldom allow it, and the pages are ours. The rest: Chromium itself asks nothing of the network."""

TIMEOUT_MS = 60_000
"""For one action on a page: a loaded machine may take long to start Chromium."""


@dataclass
class Opened:
    """A page, and what it did since it was opened.

    Attributes:
        page: To look at and to act on.
        errors: Errors on the console, uncaught exceptions, and requests that failed.
        requests: Every URL that was asked for.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Browser]:
    """One browser; while it is open, nothing else in this process can run an event loop."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET, timeout=TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Opened]:
    """Open a page in a context of its own, which is closed afterwards.

    Args:
        browser: What :func:`chromium` has opened.
        url: ``http://`` or ``file://``; the page has fired its load event when the context begins.
        width: Of the viewport, in CSS pixels.
        height: Of the viewport, in CSS pixels.
        dark: True if the browser reports a preference for dark colours.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", locale="en-US"
    )
    try:
        context.set_default_timeout(TIMEOUT_MS)
        seen = Opened(context.new_page())
        seen.page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("requestfailed", lambda request: seen.errors.append(f"{request.url}: {request.failure}"))
        seen.page.goto(url)
        yield seen
    finally:
        context.close()
