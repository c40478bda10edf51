"""A pytest plugin: tests declare the promise that they verify, the dose of faults, and the outcome.

    @promise(fault="the operator is killed", promise="no run notices", how="SIGKILL before and after every write")
    def test_crash_at_every_write(dose, outcome): ...

`--chaos full` runs the full dose and writes the results to docs/reliability.md; the short dose is the default.
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
    """Mark a test or a case with its row in the page; cases with the same promise share a row."""
    return pytest.mark.promise(fault=fault, promise=promise, how=how)


class Dose(Protocol):
    """How much of a fault a test injects."""

    def __call__(self, *, short: int, full: int) -> int:
        """Return the number for this run."""


@dataclass
class Record:
    """The results of one promise."""

    how: str
    tests: dict[str, bool] = field(default_factory=dict)
    """Whether each test, by its id, has passed so far."""
    lines: list[str] = field(default_factory=list)

    def result(self, day: date) -> str:
        """Return the text for the last column."""
        failed = [test for test, passed in self.tests.items() if not passed]
        verdict = f"**failed** ({len(failed)} of {len(self.tests)})" if failed else "passed"
        return "; ".join([f"{verdict}, {day}", *dict.fromkeys(self.lines)])


class Ledger:
    """Collects the records of a run."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.records: dict[tuple[str, str], Record] = {}

    def take(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Record the result of a test phase; skipped tests are ignored."""
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
    """Register the markers, and create the ledger."""
    config.addinivalue_line("markers", "promise(fault, promise, how): the row of docs/reliability.md that a test fills")
    config.addinivalue_line("markers", "full_dose: takes minutes, and runs with --chaos full only")
    config.stash[LEDGER] = Ledger(config.getoption("--chaos"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of the full dose in a short run."""
    if config.stash[LEDGER].mode == "full":
        return
    left_out = [item for item in items if item.get_closest_marker("full_dose")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record every phase of a test in the ledger."""
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
    """The dose of this run: `dose(short=3, full=50)`."""
    mode = pytestconfig.stash[LEDGER].mode

    def choose(*, short: int, full: int) -> int:
        return full if mode == "full" else short

    return choose


@pytest.fixture
def outcome(record_property: Callable[[str, Any], None]) -> Callable[[str], None]:
    """Record a measurement for the last column: `outcome("50 of 50 finished")`."""

    def record(line: str) -> None:
        print(line)
        record_property("outcome", line)

    return record
