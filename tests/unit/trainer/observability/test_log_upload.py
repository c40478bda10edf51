"""The log in the output: bounded in size and in time, and nothing that a run depends on."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_api.logfiles import LogFile, log_folder
from qlora_api.logs import Format, handler_for
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.redaction import MASK, REDACTOR
from qlora_api.report import TerminationMessage
from qlora_api.v1alpha1 import Checkpoint, Progress
from qlora_trainer.__main__ import ProcessContext, exit_with_error, exit_with_message
from qlora_trainer.errors import RunError
from qlora_trainer.observability.log_object import LogObject
from qlora_trainer.observability.log_upload import (
    HEAD_BYTES,
    MAX_FIELD_CHARACTERS,
    TAIL_BYTES,
    BoundedLog,
    LogUploader,
    TeeHandler,
    shorten,
)
from qlora_trainer.runtime.shutdown import StopFlag
from qlora_trainer.runtime.termination_message import TerminationMessageWriter
from tests.unit.trainer.processes import ROOT
from tests.unit.trainer.tiny import prepare_config, write_job

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOON = 10.0
"""Seconds for what a thread does at once."""


@dataclass
class FakeLogTarget:
    """A place that a test watches."""

    put: Callable[[bytes], object]
    found: bytes = b""

    def read_existing(self) -> bytes:
        return self.found


@pytest.fixture
def book() -> Iterator[LogUploader]:
    """A logbook that hears one logger, and uploads for a checkpoint or at the end only."""
    book, logger = LogUploader(interval=3600), logging.getLogger("qlora_trainer")
    level = logger.level
    logger.addHandler(book)
    logger.setLevel(logging.INFO)
    yield book
    logger.removeHandler(book)
    logger.setLevel(level)


def say(text: str, **told: Any) -> None:
    logging.getLogger("qlora_trainer").info(text, extra={"fields": told})


def messages(raw: bytes) -> list[str]:
    return [json.loads(line)["message"] for line in raw.splitlines()]


def report(step: int) -> Progress:
    checkpoint = Checkpoint(step=step, uri=f"s3://a/{step}", time=NOW) if step else None
    return Progress(phase=Phase.TRAINING, checkpoint=checkpoint, updated_at=NOW)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (LogFile(0), "prepare.jsonl"),
        (LogFile(1, 0, 0), "attempt-1-node-0-rank-0.jsonl"),
        (LogFile(12, 3, 31), "attempt-12-node-3-rank-31.jsonl"),
        (LogFile(2, 1), "attempt-2-node-1.jsonl"),
    ],
)
def test_log_file_name_parses_to_attempt_and_rank(file: LogFile, name: str) -> None:
    assert (file.name, LogFile.parse(name)) == (name, file)


@pytest.mark.parametrize(
    "name", ["attempt-1.jsonl", "attempt-1-node-0-rank-0.jsonl.part", "attempt-x-node-0.jsonl", ""]
)
def test_other_names_are_no_log_files(name: str) -> None:
    assert LogFile.parse(name) is None


def test_log_folder_is_per_qlorajob() -> None:
    assert (log_folder("0a1b"), log_folder("")) == ("logs/0a1b", "logs")


def test_short_log_is_complete() -> None:
    kept = BoundedLog(first_bytes=8, last_bytes=8)
    for line in ("one", "two", "three"):
        kept.add(line)
    assert kept.text() == b"one\ntwo\nthree\n"


def test_long_log_has_head_tail_and_an_omission_line() -> None:
    kept, lines = (
        BoundedLog(first_bytes=500, last_bytes=500),
        [f'{{"time": "00:{number:04}"}}' for number in range(1000)],
    )
    for line in lines:
        kept.add(line)
    told = kept.text().decode().splitlines()
    size = len(lines[0]) + 1
    each = 500 // size
    assert told[:each] == lines[:each]
    assert told[each + 1 :] == lines[-each:]
    gap, left_out = json.loads(told[each]), 1000 - 2 * each
    assert gap["message"].startswith(f"{left_out} lines ({left_out * size:,} bytes) are left out here")
    assert (each, gap["time"]) == (25, "00:0974"), "when the last of them was said"
    assert kept.count == 1000


def test_bounded_log_has_bounded_memory() -> None:
    kept = BoundedLog(first_bytes=1000, last_bytes=1000)
    for line in ("x" * 5000, "é" * 600, "short", "\ud800 alone"):
        kept.add(line)
    text = kept.text()
    assert len(text) < 1000 + 1000 + 400
    assert text.endswith(b"short\n? alone\n")


def test_a_line_without_end_keeps_its_beginning_and_its_end() -> None:
    long = "first " + "x" * 10 * MAX_FIELD_CHARACTERS + " last"
    line = shorten(json.dumps({"message": "it failed", "exception": long, "deep": [long], "step": 3}))
    told = json.loads(line)
    assert (told["message"], told["step"]) == ("it failed", 3)
    for name in ("exception", "deep"):
        assert "first" in told[name][:10]
        assert "last" in told[name][-10:]
        assert "characters are left out" in told[name]
        assert len(told[name]) < MAX_FIELD_CHARACTERS + 100
    assert shorten('{"message": "short"}') == '{"message": "short"}'


def test_log_is_uploaded_with_a_checkpoint_and_at_the_end(book: LogUploader) -> None:
    uploads: list[bytes] = []
    happened = threading.Condition()

    def put(text: bytes) -> None:
        with happened:
            uploads.append(text)
            happened.notify()

    say("before the output was known")
    book.start(FakeLogTarget(put))
    with happened:
        for step in (0, 2, 2):
            say(f"after step {step}")
            book.report(report(step))
        assert happened.wait_for(lambda: uploads, SOON)
    assert messages(uploads[-1])[:3] == ["before the output was known", "after step 0", "after step 2"]
    say("the end")
    book.finish()
    assert messages(uploads[-1]) == ["before the output was known", *(f"after step {n}" for n in (0, 2, 2)), "the end"]
    before = len(uploads)
    book.finish()
    assert len(uploads) == before, "nothing new was said"


def test_requeued_attempt_appends_to_its_log(book: LogUploader) -> None:
    uploads: list[bytes] = []
    say("again")
    book.start(FakeLogTarget(uploads.append, b'{"message": "the first pod"}\n'))
    book.report(report(2))
    say("the end")
    book.finish()
    assert messages(uploads[-1]) == ["the first pod", "again", "the end"]


def test_an_earlier_log_is_bounded_like_any_other() -> None:
    kept = BoundedLog(first_bytes=10, last_bytes=10)
    for line in ("five", "six"):
        kept.add(line)
    kept.prepend(b"one\ntwo\nthree\nfour\n")
    first, second, gap, *last = kept.text().splitlines()
    assert [first, second, *last] == [b"one", b"two", b"five", b"six"]
    assert json.loads(gap)["message"].startswith("2 lines (11 bytes)")


def test_an_upload_comes_from_time_to_time() -> None:
    uploaded = threading.Event()
    book = LogUploader(interval=0.05)
    book.start(FakeLogTarget(lambda _: uploaded.set()))
    book.handle(logging.LogRecord("a", logging.INFO, "f", 1, "said", (), None))
    assert uploaded.wait(SOON)
    book.finish()


def test_failing_log_upload_warns_once(book: LogUploader, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[bytes] = []

    def refuse(text: bytes) -> None:
        tries.append(text)
        raise RunError(Reason.S3_DENIED, "spec.output.uri: PutObject is refused")

    book.start(FakeLogTarget(refuse))
    for step in (1, 2, 3):
        say("a step")
        book.report(report(step))
        ends = time.monotonic() + SOON
        while len(tries) < step and time.monotonic() < ends:
            time.sleep(0.01)
    book.finish()
    assert len(tries) >= 3
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["the log is not in the output: spec.output.uri: PutObject is refused"]


def test_an_upload_that_hangs_delays_the_end_by_its_bound_and_the_run_not_at_all(
    book: LogUploader, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, entered = threading.Event(), threading.Event()

    def hang(_: bytes) -> None:
        entered.set()
        go_on.wait()

    book.start(FakeLogTarget(hang))
    say("a step")
    started = time.monotonic()
    book.report(report(1))
    assert entered.wait(SOON)
    for step in range(2, 100):
        say("a step")
        book.report(report(step))
    assert time.monotonic() - started < 1
    started = time.monotonic()
    book.finish(0.3)
    assert 0.3 <= time.monotonic() - started < 2
    go_on.set()
    assert caplog.messages[-1] == "the end of the log is not in the output: it could not be written within 0.3 s"


def test_no_secret_is_uploaded(book: LogUploader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REDACTOR, "_values", set())
    monkeypatch.setattr(REDACTOR, "_secret_pattern", None)
    REDACTOR.add_secrets(["c4n4ry/of+the/output"])
    uploads: list[bytes] = []
    book.start(FakeLogTarget(uploads.append))
    say(
        "c4n4ry/of+the/output",
        url="https://u:c4n4ry-of-a-url@s3",
        long=["c4n4ry/of+the/output " * 2000],
        token="c4n4ry",
    )
    book.finish()
    assert MASK.encode() in uploads[-1]
    assert b"c4n4ry" not in uploads[-1]


@pytest.fixture
def process(book: LogUploader, tmp_path: Path) -> ProcessContext:
    return ProcessContext(TerminationMessageWriter(tmp_path / "word"), log_uploader=book)


def test_the_log_has_the_reason_of_a_failure(process: ProcessContext) -> None:
    uploads: list[bytes] = []
    process.log_uploader.start(FakeLogTarget(uploads.append))
    assert exit_with_error(RunError(Reason.LOSS_DIVERGED, "loss 80"), process) == 1
    last = json.loads(uploads[-1].splitlines()[-1])
    assert (last["message"], last["reason"]) == ("the run failed", "LossDiverged")


def test_unwritable_output_does_not_delay_exit(process: ProcessContext) -> None:
    uploads: list[bytes] = []
    process.log_uploader.start(FakeLogTarget(uploads.append))
    exit_with_error(RunError(Reason.S3_DENIED, "spec.output.uri: s3://a/b: PutObject is refused"), process)
    assert uploads == []


def test_done_file_is_written_after_the_log(
    process: ProcessContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the others of its pod then."""
    seen: list[list[str]] = []
    process.log_uploader.start(FakeLogTarget(lambda _: seen.append(sorted(path.name for path in tmp_path.iterdir()))))
    assert exit_with_message(TerminationMessage(reason=Reason.PUBLISHED), process, tmp_path / "word") == 0
    assert (seen, (tmp_path / "word").exists()) == ([[]], True)
    monkeypatch.setenv("RANK", "1")
    other = ProcessContext(TerminationMessageWriter(tmp_path / "1.json"))
    other.log_uploader.start(FakeLogTarget(lambda _: seen.append(sorted(path.name for path in tmp_path.iterdir()))))
    other.log_uploader.handle(logging.LogRecord("a", logging.INFO, "f", 1, "said", (), None))
    assert exit_with_message(None, other, tmp_path / "{rank}.json") == 0
    assert (seen[1], (tmp_path / "1.done").exists()) == (["word"], True)


def test_a_stop_while_the_log_is_written_changes_nothing(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from types import SimpleNamespace
from qlora_api.reasons import Reason
from qlora_api.report import LastWord
from qlora_trainer.__main__ import COMMANDS, main

def train(options, process):
    put = lambda text: os.kill(os.getpid(), signal.SIGTERM)
    process.logbook.open(SimpleNamespace(earlier=bytes, put=put))
    return LastWord(reason=Reason.PUBLISHED)

COMMANDS["train"] = train
sys.exit(main(["train", "--work", sys.argv[1], "--termination-message", sys.argv[1] + "/word"]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert TerminationMessage.model_validate_json((tmp_path / "word").read_text()).reason == Reason.PUBLISHED


class Asked(logging.Handler):
    """An output in the middle of which the process is asked to stop."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            self.handleError(record)  # as logging's own handlers take whatever is raised within them


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("a", logging.INFO, "f", 1, text, (), None)


def test_sigterm_within_a_log_line_is_delayed(stop: StopFlag) -> None:
    book = LogUploader()
    lines, uploads = TeeHandler(Asked(), book, stop), list[bytes]()
    with pytest.raises(RunError, match="asked to stop"):
        lines.handle(record("said"))
    lines.handle(record("the end"))
    book.start(FakeLogTarget(uploads.append))
    book.finish()
    assert messages(uploads[-1]) == ["said", "the end"]


def test_log_line_of_another_thread_does_not_delay_sigterm(stop: StopFlag) -> None:
    inside, over = threading.Event(), threading.Event()

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 (logging's signature)
            inside.set()
            assert over.wait(SOON)

    thread = threading.Thread(target=TeeHandler(Slow(), LogUploader(), stop).handle, args=(record("said"),))
    thread.start()
    try:
        assert inside.wait(SOON)
        with pytest.raises(RunError, match="asked to stop"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        over.set()
        thread.join()


def test_the_log_has_the_lines_of_many_threads_in_the_order_of_standard_output() -> None:
    written, book, uploads = io.StringIO(), LogUploader(), list[bytes]()
    lines = TeeHandler(handler_for(Format.JSON, written), book, StopFlag())

    def say_much(name: int) -> None:
        for number in range(300):
            lines.handle(record(f"{name} says {number}"))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=say_much, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    book.start(FakeLogTarget(uploads.append))
    book.finish()
    assert uploads[-1].decode() == written.getvalue()


def test_the_log_of_a_preparation_is_beside_the_results(tmp_path: Path) -> None:
    spec = write_job(tmp_path, dataset={"uri": f"file://{tmp_path}/absent.jsonl"})
    config = prepare_config(spec).model_copy(update={"uid": "0a1b"})
    (tmp_path / "config.json").write_text(config.model_dump_json(by_alias=True))
    options = {"config": tmp_path / "config.json", "work": tmp_path / "work", "termination-message": tmp_path / "word"}
    command = [
        sys.executable,
        "-m",
        "qlora_trainer",
        "prepare",
        *(f"--{name}={path}" for name, path in options.items()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    kept = tmp_path / "output" / "colours" / "logs" / "0a1b" / "prepare.jsonl"
    assert kept.read_text() == done.stdout
    assert json.loads(kept.read_text().splitlines()[-1])["reason"] == "DatasetNotFound"
    place = LogObject(config, LogFile(0))
    assert (place.read_existing(), LogObject(config, LogFile(1)).read_existing()) == (done.stdout.encode(), b"")
    with kept.open("ab") as file:
        file.truncate(2 * (HEAD_BYTES + TAIL_BYTES) + 1)
    assert place.read_existing() == b"", "none of ours is so large"
