"""Opens a file in Chromium with a given screen size and color scheme."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.cluster.host.progress import Unavailable
from tests.cluster.programs.packages import ensure_commands

PROGRAMS: Final = ("chromium", "google-chrome")


class Screen(NamedTuple):
    """A screen size and color scheme."""

    name: str
    width: int
    """CSS pixels."""
    scheme: Literal["light", "dark"]


@dataclass
class OpenPage:
    """An open page, with its requests and console errors."""

    page: Page
    screen: Screen
    requests: list[str] = field(default_factory=list)
    """All requests, blocked ones included."""
    answers: list[str] = field(default_factory=list)
    """URLs that were answered."""
    console_errors: list[str] = field(default_factory=list)

    def evaluate(self, script: str) -> Any:
        return self.page.evaluate(script)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start the browser, installing it first if possible; skip the test otherwise."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_program())
        try:
            yield browser
        finally:
            browser.close()


def find_program() -> str:
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        try:
            ensure_commands("chromium")
        except Unavailable:
            pytest.skip("the test needs Chromium: `apt-get install chromium`, or run as root on Debian")
    return found or str(shutil.which("chromium"))


@contextmanager
def open_page(browser: Browser, path: Path, screen: Screen) -> Iterator[OpenPage]:
    """Open a file in a new window, and record its requests and console errors."""
    phone = screen.width < 600
    context = browser.new_context(
        viewport={"width": screen.width, "height": 844 if phone else 900},
        color_scheme=screen.scheme,
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
        has_touch=phone,
    )
    opened = OpenPage(context.new_page(), screen)
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.on("response", lambda response: opened.answers.append(response.url))
    opened.page.on("console", lambda message: opened.console_errors.append(message.text))
    opened.page.on("pageerror", lambda error: opened.console_errors.append(str(error)))
    try:
        opened.page.goto(path.as_uri())
        yield opened
    finally:
        context.close()
