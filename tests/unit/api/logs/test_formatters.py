"""Log lines: their fields, for both programs alike, and no secret in any of them."""

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from qlora_api.logs import formatters
from qlora_api.logs.formatters import (
    Format,
    JsonFormatter,
    TextFormatter,
    bind_process_fields,
    bind_task_fields,
    log_fields,
    record_to_dict,
)
from qlora_api.logs.redaction import MASK, REDACTOR


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test with a process without bound fields and secrets."""
    monkeypatch.setattr(formatters, "_process", {})
    monkeypatch.setattr(REDACTOR, "_values", set())
    monkeypatch.setattr(REDACTOR, "_secret_pattern", None)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a logger writes as JSON."""
    stream, logger = io.StringIO(), logging.getLogger("qlora_test")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    yield stream
    logger.removeHandler(handler)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_log_line_has_standard_fields(written: io.StringIO) -> None:
    bind_process_fields(rank=3)
    bind_task_fields(namespace="ml", job="support-bot")
    logging.getLogger("qlora_test").warning("step %d", 7, extra=log_fields(step=7, loss=2.5))
    bind_task_fields()
    (line,) = lines(written)
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.tzinfo is not None
    assert line == {
        "level": "warning", "logger": "qlora_test", "message": "step 7", "rank": 3, "namespace": "ml",
        "job": "support-bot", "step": 7, "loss": 2.5,
    }  # fmt: skip
    assert list(lines(written)[0])[:4] == ["time", "level", "logger", "message"]


def test_custom_field_never_overwrites_standard_field(written: io.StringIO) -> None:
    logging.getLogger("qlora_test").info("true", extra=log_fields(message="false", level="none"))
    assert (lines(written)[0]["message"], lines(written)[0]["level"]) == ("true", "info")


def test_fields_of_the_process_are_in_the_lines_of_every_thread(written: io.StringIO) -> None:
    bind_process_fields(job="support-bot")
    thread = threading.Thread(target=logging.getLogger("qlora_test").info, args=("from a thread",))
    thread.start()
    thread.join()
    assert lines(written)[0]["job"] == "support-bot"


def test_exception_is_a_field_of_its_line(written: io.StringIO) -> None:
    REDACTOR.add_secrets(["c4n4ry-in-an-exception"])
    try:
        int("c4n4ry-in-an-exception")
    except ValueError:
        logging.getLogger("qlora_test").exception("it failed")
    (line,) = lines(written)
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith(f"invalid literal for int() with base 10: '{MASK}'")


@pytest.mark.parametrize("form", [JsonFormatter(), TextFormatter()])
def test_log_line_contains_no_secret(form: logging.Formatter) -> None:
    REDACTOR.add_secrets(['c4n4ry "with" quotes'])
    record = logging.LogRecord("a", logging.INFO, "f", 1, "message %s", ('c4n4ry "with" quotes',), None)
    told = {
        "error": 'c4n4ry "with" quotes',
        "deep": {"x": ['c4n4ry "with" quotes']},
        "object": {'c4n4ry "with" quotes'},
    }
    record.fields = told | {"shown": repr('c4n4ry "with" quotes'), "token": "c4n4ry"}
    assert "c4n4ry" not in form.format(record)


def test_value_that_json_lacks_is_written_as_text(written: io.StringIO) -> None:
    logging.getLogger("qlora_test").info("x", extra=log_fields(path=pytest, none=None, yes=True))
    assert lines(written)[0]["path"].startswith("<module")
    assert (lines(written)[0]["none"], lines(written)[0]["yes"]) == (None, True)


def test_text_for_a_terminal() -> None:
    record = logging.LogRecord("qlora_trainer", logging.INFO, "f", 1, "done", (), None)
    record.fields = {"reason": "Published", "note": "two words", "step": 3}
    text = TextFormatter().format(record)
    assert text == f'{record_to_dict(record)["time"]} info    done  reason=Published note="two words" step=3'


@pytest.mark.parametrize(
    ("asked", "form"), [("", Format.JSON), ("json", Format.JSON), ("text", Format.TEXT), ("xml", Format.JSON)]
)
def test_environment_selects_log_format(monkeypatch: pytest.MonkeyPatch, asked: str, form: Format) -> None:
    monkeypatch.setenv(formatters.FORMAT_ENV, asked)
    assert formatters.format_from_environment() is form


SCRIPT = """
import logging, sys, warnings
from qlora_api.logs.formatters import Format, configure_logs, handler_for
configure_logs(handler_for(Format.JSON, sys.stdout), "info")
logging.getLogger("a.library").info("multi\\nline")
warnings.warn("old", FutureWarning)
"""


def test_libraries_and_warnings_come_in_the_same_form() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in out.stdout.splitlines()]
    assert [(line["logger"], line["level"]) for line in told] == [("a.library", "info"), ("py.warnings", "warning")]
    assert out.stderr == ""
