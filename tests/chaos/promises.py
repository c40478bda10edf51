"""A pytest plugin: tests say which promise they hold, in which dose, and what came out of it.

    @promise(fault="the operator is killed", promise="no run notices", how="SIGKILL before and after every write")
    def test_crash_at_every_write(dose, outcome): ...

`--chaos full` takes the whole dose and writes the results into docs/reliability.md; the short one is for every day.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import pytest

from tests.chaos.page import Row, link_to, render_page

PAGE: Final = Path("docs/reliability.md")
Mode = Literal["short", "full"]


def promise(*, fault: str, promise: str, how: str) -> pytest.MarkDecorator:
    """Mark a test, or one case of it, with the row that it fills; cases with the same promise share a row."""
    return pytest.mark.promise(fault=fault, promise=promise, how=how)


class Dose(Protocol):
    """How much of a fault a test takes."""

    def __call__(self, *, short: int, full: int) -> int:
        """Return the number for this run."""


@dataclass
class Record:
    """What is known of one promise when the run is over."""

    how: str
    tests: dict[str, bool] = field(default_factory=dict)
    """Whether each test, by its id, has passed so far."""
    lines: list[str] = field(default_factory=list)

    def result(self, day: date) -> str:
        """Say how it went."""
        failed = [test for test, passed in self.tests.items() if not passed]
        verdict = f"**failed** ({len(failed)} of {len(self.tests)})" if failed else "passed"
        return "; ".join([f"{verdict}, {day}", *dict.fromkeys(self.lines)])


class Ledger:
    """Collects the records of a run."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.records: dict[tuple[str, str], Record] = {}

    def take(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Note how a phase of a test went; a test that never ran says nothing."""
        marker = item.get_closest_marker("promise")
        if marker is None or report.skipped:
            return
        words = marker.kwargs
        file, name = item.nodeid.split("::")[0], item.nodeid.rpartition("::")[2].partition("[")[0]
        record = self.records.setdefault((words["fault"], words["promise"]), Record(words["how"] + link_to(file, name)))
        record.tests[item.nodeid] = report.passed and record.tests.get(item.nodeid, True)
        if report.when == "call":
            record.lines += [str(value) for name, value in item.user_properties if name == "outcome"]

    def rows(self, day: date) -> list[Row]:
        """Return the rows of the page."""
        return [Row(*words, record.how, record.result(day)) for words, record in self.records.items()]


LEDGER: Final = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --chaos."""
    parser.addoption(
        "--chaos", choices=["short", "full"], default="short", help=f"dose of faults; full also writes {PAGE}"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker, and begin a ledger."""
    config.addinivalue_line("markers", "promise(fault, promise, how): the row of docs/reliability.md that a test fills")
    config.addinivalue_line("markers", "full_dose: takes minutes, and runs with --chaos full only")
    config.stash[LEDGER] = Ledger(config.getoption("--chaos"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only the full dose has."""
    if config.stash[LEDGER].mode == "full":
        return
    left_out = [item for item in items if item.get_closest_marker("full_dose")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hand every phase of a test to the ledger."""
    report = yield
    item.config.stash[LEDGER].take(item, report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page after a full run."""
    ledger, page = session.config.stash[LEDGER], session.config.rootpath / PAGE
    if ledger.mode == "full" and ledger.records:
        rows = ledger.rows(datetime.now(UTC).date())
        page.write_text(render_page(page.read_text(encoding="utf-8"), rows, session.config.rootpath), encoding="utf-8")


@pytest.fixture(scope="session")
def dose(pytestconfig: pytest.Config) -> Dose:
    """How much: `dose(short=3, full=50)`."""
    mode = pytestconfig.stash[LEDGER].mode

    def choose(*, short: int, full: int) -> int:
        return full if mode == "full" else short

    return choose


@pytest.fixture
def outcome(record_property: Callable[[str, Any], None]) -> Callable[[str], None]:
    """Tell what was measured, for the last column: `outcome("50 of 50 finished")`."""

    def tell(line: str) -> None:
        print(line)
        record_property("outcome", line)

    return tell
