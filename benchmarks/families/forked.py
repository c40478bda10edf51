"""Runs Python modules and functions in forked processes, which need not import torch and transformers again."""

import contextlib
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

_POLL_SECONDS: Final = 0.05
_run = subprocess.run


def fork_modules() -> None:
    """Make subprocess.run fork for `python -m MODULE`: imports are the parent's, all else is as in a new process."""
    subprocess.run = _run_forked  # type: ignore[assignment]


def _run_forked(arguments: Sequence[str], **options: Any) -> Any:
    if list(arguments[:2]) != [sys.executable, "-m"]:
        return _run(arguments, **options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").write_text(options.get("input") or "")
        code = call_forked(lambda: _run_module(arguments[2:], folder, options), options["timeout"])
        if code is None:
            raise subprocess.TimeoutExpired(arguments, options["timeout"])
        return subprocess.CompletedProcess(arguments, code, (folder / "out").read_text(), (folder / "err").read_text())


def _run_module(arguments: Sequence[str], folder: Path, options: Any) -> None:
    for number, name, flags in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        os.dup2(os.open(folder / name, flags | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
    if (cwd := options.get("cwd")) is not None:
        os.chdir(cwd)
    if (environment := options.get("env")) is not None:
        os.environ.clear()
        os.environ.update(environment)
    sys.argv = list(arguments)
    runpy.run_module(arguments[0], run_name="__main__")


class Limits(NamedTuple):
    """What a forked process may take."""

    memory: int
    """Bytes of private memory."""
    cpu_seconds: int


def call_forked(work: Callable[[], None], timeout: float, limits: Limits | None = None) -> int | None:
    """Return the exit code of a function in a forked process, negative for a signal; None if it took too long.

    With limits, it is killed together with all processes that it forked itself.
    """
    pid = os.fork()
    if pid == 0:
        _work_and_exit(work, limits)
    kill = os.kill if limits is None else os.killpg
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_SECONDS)
    kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _work_and_exit(work: Callable[[], None], limits: Limits | None) -> NoReturn:
    code = 1
    try:
        if limits is not None:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
            resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds))
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
