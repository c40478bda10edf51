"""Runs a reader of foreign data in a process of its own, with a limit of memory and time, and returns how it ended."""

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from qlora_trainer.errors import RunError

MAX_SECONDS = 60
ADDRESS_SPACE = 16 << 30
"""Of the process, so that a bomb that nothing stops does not take the machine's memory."""
_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload(["qlora_trainer.data.sources", "pyarrow.parquet"])


class Ended(NamedTuple):
    """How a reader ended."""

    reason: str
    """Of its RunError, the type of any other exception, or empty."""
    message: str
    """Of its exception, or what it returned."""
    peak: int
    """Bytes of memory that the process had at most."""
    grown: int = 0
    """By how many of them it grew: what the process starts with depends on the tests before it."""


def run_in_child(read: Callable[..., str], *arguments: Any) -> Ended:
    receiver, sender = _CHILDREN.Pipe(duplex=False)
    child = _CHILDREN.Process(target=_read, args=(sender, read, arguments), daemon=True)
    child.start()
    sender.close()
    try:
        assert receiver.poll(MAX_SECONDS), f"no result in {MAX_SECONDS} s"
        return receiver.recv()
    except EOFError:
        child.join()
        return Ended(f"exit code {child.exitcode}", "", 0)
    finally:
        child.kill()
        child.join()


def _read(sender: Connection, read: Callable[..., str], arguments: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    before = _peak()
    try:
        reason, message = "", read(*arguments)
    except RunError as error:
        reason, message = error.reason.value, error.message
    except BaseException as error:
        reason, message = type(error).__name__, str(error)
    sender.send(Ended(reason, message, _peak(), _peak() - before))


def _peak() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) << 10
