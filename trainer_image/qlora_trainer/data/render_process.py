"""The child process that renders chat templates: it has limits of CPU time, memory and text, and no secrets.

Only this process reads what the parent pickles; the parent reads JSON.
"""

import atexit
import contextlib
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final, NamedTuple

from qlora_trainer.data.chat_renderer import ChatRenderer, TemplateRejectionError, cause_of, set_fixed_clock
from qlora_trainer.data.render_limits import (
    CPU_BUDGET,
    CPU_SECONDS,
    MEMORY_BYTES,
    MIB,
    PARTS_CHARACTERS,
    PARTS_PER_BYTE,
    ROW_SECONDS,
    TEXT_CHARACTERS,
    TEXT_PER_BYTE,
    limit_memory,
    limit_process,
)
from qlora_trainer.data.rows import MAX_TEXT_BYTES, RowError

_LENGTH: Final = struct.Struct("!Q")
_READY: Final = b"ready\n"
_TOO_SLOW: Final = f"did not end within {CPU_SECONDS:g} s of CPU time"
_TOO_SLOW_ROW: Final = f"took more than {ROW_SECONDS:g} s of CPU time for one row"
_TOO_MUCH_MEMORY: Final = f"took more than {MEMORY_BYTES // MIB:,} MiB of memory"
_TOO_LONG: Final = f"rendered more than {TEXT_CHARACTERS // 10**6} million characters"
_TOO_LARGE: Final = (
    f"the chat template renders more than {MAX_TEXT_BYTES // MIB} MiB of text for it; split the row, or correct the "
    "template"
)
_TOO_MANY_PARTS: Final = (
    "the chat template rewrites its earlier answers, so that each is learned from a text of its own, and these are too "
    "long together; split the row"
)
_INHERITED: Final = ("LD_LIBRARY_PATH",)
"""Variables that an interpreter may need to start; no other is passed on, as they hold keys and addresses."""
_BYTES_PER_LINE: Final = 4096
"""Of an answer without its text: error types, spans."""


class RenderLimitError(Exception):
    """A template exceeded a limit of the process; the message completes the sentence "the chat template …"."""


class Call(NamedTuple):
    """A method of ChatRenderer and its arguments."""

    method: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = {}


class RenderProcess:
    """Starts the child process when it is needed, and again after a template that exceeded a limit."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, renderer: ChatRenderer, calls: Sequence[Call]) -> list[Any]:
        """Return for each call its value, as JSON has it, or the RowError that it raised.

        Raises:
            RenderLimitError: The template takes too much time or memory, or renders too much text.

        """
        dumped = [_dump(call) for call in calls]
        request = pickle.dumps((renderer, dumped))
        with self._lock:
            try:
                return [_to_outcome(answer) for answer in self._exchange(request, dumped)]
            except BaseException:
                self.close()  # the answers that are left belong to this request
                raise

    def close(self) -> None:
        """End the child process."""
        child, self._child = self._child, None
        if child is not None:
            _end(child)

    def _exchange(self, request: bytes, calls: Sequence[bytes | None]) -> Iterator[dict[str, Any]]:
        if self._child is None or self._child.poll() is not None:
            self._child = _start()
        child = self._child
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the process that renders chat templates has no pipes")
        with contextlib.suppress(BrokenPipeError):  # the first answer is missing then, and the exit code says why
            child.stdin.write(_LENGTH.pack(len(request)) + request)
            child.stdin.flush()
        # JSON takes at most six bytes for a character.
        longest = 6 * (_text_limit(calls) + TEXT_CHARACTERS) + _BYTES_PER_LINE
        for _ in calls:
            line = child.stdout.readline(longest)
            if not line.endswith(b"\n"):
                raise RenderLimitError(_why_ended(child.wait()))
            answer: dict[str, Any] = json.loads(line)
            if "limit" in answer:
                raise RenderLimitError(answer["limit"])
            yield answer


def _start() -> subprocess.Popen[bytes]:
    """Start the process with this one's import path, and none of its variables."""
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path)),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # of numpy, which transformers imports: a buffer for each core of the node
    }
    command = [sys.executable, "-P", "-s", "-m", __name__]
    child = subprocess.Popen(  # noqa: S603 (our own)
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,  # Ctrl-C is for the parent
    )
    try:
        line = child.stdout.readline() if child.stdout is not None else b""
    except BaseException:  # SIGTERM too: nobody else knows the child yet
        _end(child)
        raise
    if line != _READY:
        raise RuntimeError(f"the process that renders chat templates ended with exit code {child.wait()}; see above")
    return child


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # flushes into a pipe that nobody reads any more
                stream.close()


RENDER_PROCESS: Final = RenderProcess()
"""One for all templates of a process."""
atexit.register(RENDER_PROCESS.close)


def _dump(call: Call) -> bytes | None:
    """Return the arguments as bytes, each call for itself; None for a row that is nested too deeply."""
    try:
        return pickle.dumps(tuple(call))
    except RecursionError:
        return None


def _to_outcome(answer: Mapping[str, Any]) -> Any:
    if "rejected" in answer:
        rejection = TemplateRejectionError(*answer["rejected"])
        rejection.__cause__ = cause_of(rejection)
        return rejection
    return RowError(answer["error"]) if "error" in answer else answer["value"]


def _why_ended(code: int) -> str:
    """Say what an exit code means."""
    if code == -signal.SIGPROF:
        return _TOO_SLOW
    if code == -signal.SIGVTALRM:
        return _TOO_SLOW_ROW
    if code == -signal.SIGKILL:
        return _TOO_MUCH_MEMORY  # the kernel's OOM killer, in a pod with less than the limit
    return f"ended the process that rendered it (exit code {code})"


def _text_limit(calls: Sequence[bytes | None]) -> int:
    """Return the characters that a batch may be rendered to: by its rows, whatever the template has itself."""
    return TEXT_CHARACTERS + TEXT_PER_BYTE * sum(len(call or b"") for call in calls)


def _parts_limit(size: int) -> int:
    return min(PARTS_CHARACTERS + PARTS_PER_BYTE * size, TEXT_CHARACTERS)


def main() -> None:
    """Answer requests until standard input ends."""
    answers = sys.stdout.buffer
    set_fixed_clock()
    mapped = limit_process()
    answers.write(_READY)
    answers.flush()
    while header := sys.stdin.buffer.read(_LENGTH.size):
        (size,) = _LENGTH.unpack(header)
        limit_memory(mapped, size)
        _answer(sys.stdin.buffer.read(size), answers)


def _answer(request: bytes, answers: IO[bytes]) -> None:
    """Write one line for each call, the last one for a limit that was exceeded."""
    try:
        renderer, calls = pickle.loads(request)  # noqa: S301 (of the parent)
        text_left = _text_limit(calls)
        for call in calls:
            answer = _call(renderer, call)
            *earlier, whole = _texts_of(answer)
            if sum(map(len, earlier)) > _parts_limit(len(call or b"")):
                answer, whole = {"error": _TOO_MANY_PARTS}, ""
            # A row has a budget of its own for earlier parts, so that no row is refused for those beside it.
            text_left -= len(whole)
            if text_left < 0:
                answers.write(_to_line({"limit": _TOO_LONG}))
                break
            if any(map(_is_too_large, _tokenized_texts(answer))):
                answer = {"error": _TOO_LARGE}
            answers.write(_to_line(answer))
    except MemoryError:
        answers.write(_to_line({"limit": _TOO_MUCH_MEMORY}))
    answers.flush()


def _tokenized_texts(answer: Mapping[str, Any]) -> list[str]:
    value = answer.get("value", "")
    return [value] if isinstance(value, str) else [text for part in value for text in (part.text, part.prompt)]


def _is_too_large(text: str) -> bool:
    """Return whether a text has more bytes than can be tokenized."""
    return 4 * len(text) > MAX_TEXT_BYTES and len(text.encode(errors="surrogatepass")) > MAX_TEXT_BYTES


def _texts_of(answer: Mapping[str, Any]) -> list[str]:
    """Return the text of each part, the last of the whole conversation."""
    value = answer.get("value", "")
    return [value] if isinstance(value, str) else [part.text + part.prompt for part in value]


def _to_line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"


def _call(renderer: ChatRenderer, pickled: bytes | None) -> dict[str, Any]:
    if pickled is None:
        return {"error": "it is nested too deeply; shorten it"}
    method, arguments, options = pickle.loads(pickled)  # noqa: S301 (of the parent)
    random.seed(0)  # Jinja's filter `random` makes the same choice for the same row
    try:
        with CPU_BUDGET.one_row(len(pickled)):
            return {"value": getattr(renderer, method)(*arguments, **options)}
    except TemplateRejectionError as error:
        return {"rejected": (error.error, error.kind, error.line)}
    except RowError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    main()
