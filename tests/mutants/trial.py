"""Runs tests of a copied tree in a child process that has the slow libraries already, and says how they ended."""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import pytest

TIMEOUT_SECONDS: Final = 300
"""Timeout of one test; the slowest takes less than a minute on a busy machine."""
_OURS: Final = ("tests", "qlora_api", "qlora_cli", "qlora_operator", "qlora_trainer", "examples")
_ASSERTIONS: Final = ("AssertionError", "Failed")
"""What `assert` raises, and what pytest does where an expected error stays away."""


@dataclass
class Outcome:
    """How tests ended; it crosses a process boundary."""

    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    """Names of the exceptions that ended tests."""
    errors: list[str] = field(default_factory=list)
    """What went wrong before a test could say anything: imports, fixtures, time."""
    output: str = ""

    def fails_as(self, expected: str) -> bool:
        """Return whether a test failed by what it asserts, or by the one exception that is expected."""
        wanted = (expected,) if expected else _ASSERTIONS
        return not self.errors and any(name in wanted for name in self.failures)


class FailureRecorder:
    """A pytest plugin that notes the end of every test."""

    def __init__(self) -> None:
        self.outcome = Outcome()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> Iterator[None]:
        """Note the exception, since a report has only its text."""
        report = yield
        if report.failed:
            name = call.excinfo.typename if call.excinfo else "unknown"
            (self.outcome.failures if call.when == "call" else self.outcome.errors).append(name)
        elif report.skipped:
            self.outcome.skipped += 1
        elif call.when == "call":
            self.outcome.passed += 1
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be imported."""
        if report.failed:
            self.outcome.errors.append(f"cannot collect {report.nodeid}")


def preload() -> None:
    """Import what is slow and not ours, so that children need not."""
    import accelerate  # noqa: F401, PLC0415
    import bitsandbytes  # noqa: F401, PLC0415
    import datasets  # noqa: F401, PLC0415
    import peft  # noqa: F401, PLC0415
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer  # noqa: F401, PLC0415


def try_tests(tests: Sequence[str], tree: Path) -> Outcome:
    """Run tests of a tree, in a child process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    output = tree.parent / "output.txt"
    child = context.Process(target=_run, args=(tests, tree, output, theirs))
    child.start()
    theirs.close()
    outcome = _receive(ours)
    child.kill()
    child.join()
    return replace(outcome, output=output.read_text(errors="replace"))


def _receive(child: Connection) -> Outcome:
    if not child.poll(TIMEOUT_SECONDS):
        return Outcome(errors=[f"no end after {TIMEOUT_SECONDS} s"])
    try:
        return Outcome(**child.recv())
    except EOFError:
        return Outcome(errors=["the process died"])


def _run(tests: Sequence[str], tree: Path, output: Path, answer: Connection) -> None:
    """In the child: forget what was imported of the working tree, and run pytest in the copy."""
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    sources = [str(tree), str(tree / "operator"), str(tree / "trainer_image")]
    sys.path[:0] = sources
    os.environ["PYTHONPATH"] = os.pathsep.join(sources)
    os.chdir(tree)
    watch = FailureRecorder()
    # Preloaded libraries bring pytest plugins that it can no longer rewrite.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    pytest.main([*options, "--rootdir", str(tree), *tests], plugins=[watch])
    if any(not _is_of(tree, name) for name in ("qlora_api", "qlora_trainer")):
        watch.outcome.errors.append("the tests imported another tree")
    answer.send(asdict(watch.outcome))


def _is_of(tree: Path, package: str) -> bool:
    module = sys.modules.get(package)
    return module is None or Path(str(module.__file__)).is_relative_to(tree)
