"""Chromium, opened on a file with a screen of a given size and colours."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.cluster.packages import ensure_commands
from tests.cluster.progress import Unavailable

PROGRAMS: Final = ("chromium", "google-chrome")


class Screen(NamedTuple):
    """What a page is looked at on."""

    name: str
    width: int
    """CSS pixels."""
    scheme: Literal["light", "dark"]


@dataclass
class OpenPage:
    """A page that is open, and what it did that it should not."""

    page: Page
    screen: Screen
    requests: list[str] = field(default_factory=list)
    """All that it asked for, whether the browser let it or not."""
    answers: list[str] = field(default_factory=list)
    """What of that was fetched."""
    console_errors: list[str] = field(default_factory=list)

    def evaluate(self, script: str) -> Any:
        return self.page.evaluate(script)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start the browser, which is installed first where that is possible, or skip with what is missing."""
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
            pytest.skip("pages are looked at in Chromium: `apt-get install chromium`, or run as root on Debian")
    return found or str(shutil.which("chromium"))


@contextmanager
def open_page(browser: Browser, path: Path, screen: Screen) -> Iterator[OpenPage]:
    """Open a file in a window of its own, and write down what it asks for and complains of."""
    phone = screen.width < 600
    context = browser.new_context(
        viewport={"width": screen.width, "height": 844 if phone else 900},
        color_scheme=screen.scheme,
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
        has_touch=phone,
    )
    look = OpenPage(context.new_page(), screen)
    look.page.on("request", lambda request: look.requests.append(request.url))
    look.page.on("response", lambda response: look.answers.append(response.url))
    look.page.on("console", lambda message: look.console_errors.append(message.text))
    look.page.on("pageerror", lambda error: look.console_errors.append(str(error)))
    try:
        look.page.goto(path.as_uri())
        yield look
    finally:
        context.close()
