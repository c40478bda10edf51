"""Text of others (rows, answers, logs, messages, names) is shown as it is; it never moves, hides or forges a line."""

import contextlib
import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest
import typer
import yaml
from rich.panel import Panel
from rich.text import Text

from qlora_api.escapes import escape_text
from qlora_api.local_requests import ChatTurn, MergedFolder, Reply
from qlora_api.logs.files import LogFile
from qlora_api.logs.formatters import JsonFormatter, TextFormatter
from qlora_api.names import Phase
from qlora_api.reasons import Reason
from qlora_api.report import MergeReport
from qlora_api.v1alpha1 import Attempt, OutputStatus, QLoRAJobStatus
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.connection import exit_on_cluster_error
from qlora_cli.cluster.pods import parse_pod
from qlora_cli.commands import events, wait
from qlora_cli.commands.chat import ChatPrinter
from qlora_cli.commands.merge import show_merged
from qlora_cli.console import Console, echo, print_line
from qlora_cli.display.dashboard import LossHistory, render_dashboard
from qlora_cli.display.formats import print_data, render_columns, to_yaml
from qlora_cli.display.progress import LineScreen, LiveScreen, open_screen
from qlora_cli.errors import exit_error, exit_error_without_remedy, exit_interrupted, exit_on_error
from qlora_cli.manifests.loader import ManifestError, parse_manifest
from qlora_cli.manifests.yaml_documents import YamlError, describe_read_error, parse_documents
from qlora_cli.options import OutputFormat
from qlora_cli.podlogs.archived import describe_attempt, parse_log
from qlora_cli.podlogs.lines import LogPrinter
from qlora_operator.models import Decision
from qlora_operator.resources import build_event
from qlora_operator.status import derive_status
from qlora_planner.validation import COMMON_RULES
from qlora_trainer.errors import RunError
from tests.make import DIGEST, NOW, OWNER
from tests.unit.cli.fake_cluster import FAILED, make_event, make_job, make_pod
from tests.unit.cli.make import JOB

FORGED: Final = "FORGED"
ATTACKS: Final = {
    "clipboard": "\x1b]52;c;Y3VybCBldmlsfHNo\x07",
    "clipboard-st": "\x1b]52;c;Y3VybCBldmlsfHNo\x1b\\",
    "clear-screen": "\x1b[2J\x1b[1;1H published",
    "hyperlink": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "window-title": "\x1b]0;owned\x07",
    "c1-csi": "\x9b31m",
    "c1-osc": "\x9d52;c;eA==\x9c",
    "bell-and-backspace": "password: \x07secret\x08\x08\x08\x08\x08\x08",
    "carriage-return": f"error\r{FORGED} Succeeded",
    "line-break": f"first\n{FORGED}: the run has succeeded",
    "windows-line-break": f"first\r\n{FORGED}: the run has succeeded",
    "vertical-tab-and-form-feed": f"x\x0b{FORGED}\x0c{FORGED}",
    "next-line": f"x\x85{FORGED}",
    "line-separator": f"x\u2028{FORGED}\u2029{FORGED}",
    "file-separator": f"x\x1c{FORGED}",
    "bidi-override": "adapter\u202egpj.exe",
    "bidi-isolate": "if \u2066admin\u2069 \u2067",
    "arabic-letter-mark": "a\u061cb",
    "zero-width": "s3://a\u200bb/\ufeffc\u2060d",
    "tag-characters": "hi\U000e0069\U000e0067\U000e006e",
    "variation-selectors": "hi\ufe00\ufe01\U000e0100",
    "hangul-filler": "a\u3164b",
    "lone-surrogate": "a\ud800b\udc9bc",
    "null": "a\x00b",
    "delete": "a\x7fb",
}
STYLED: Final = {
    "markup": "[red]alarm[/red] [bold]x[/]",
    "markup-link": "[link=https://evil.example]click[/link]",
    "unbalanced-markup": "[/] [/red] [[",
    "emoji-code": "done :smile: :heavy_check_mark:",
}
"""What rich would interpret: it must be shown letter for letter."""


class Screen:
    """A console that is no terminal, or one without colors."""

    def __init__(self, *, terminal: bool = False) -> None:
        self._file = io.StringIO()
        options: dict[str, Any] = {"force_terminal": True, "color_system": None, "legacy_windows": False}
        self.console = Console(file=self._file, width=4000, **(options if terminal else {}))

    @property
    def shown(self) -> str:
        return self._file.getvalue()


def printed(show: Callable[[Console], object]) -> str:
    screen = Screen()
    with contextlib.suppress(typer.Exit):
        show(screen.console)
    return screen.shown


def log_line(text: str, *, raw: bool = False) -> str:
    return printed(lambda console: LogPrinter(prefix=True, raw=raw, console=console).show(POD, text))


POD: Final = parse_pod(make_pod(1))


def json_line(**fields: Any) -> str:
    return json.dumps({"time": "2026-03-01T12:00:00Z", "level": "info", "message": "m", **fields}, ensure_ascii=False)


def traced(text: str) -> dict[str, Any]:
    return {"exception": f"Traceback (most recent call last):\nValueError: {text}"}


def archived(text: str) -> str:
    raw = (json_line(message=text) + "\n").encode(errors="replace")
    lines = list(parse_log(LogFile(1, 0), raw))
    assert len(lines) == 1
    return log_line(lines[0].text)


def record(text: str) -> logging.LogRecord:
    found = logging.LogRecord("a", logging.INFO, "f", 1, "%s", (text,), None)
    found.fields = {"note": text, "path": text.replace(" ", "")}
    return found


def status_with(text: str) -> QLoRAJobStatus:
    attempt = Attempt(number=1, job="j", reason=Reason.NODE_LOST).model_copy(update={"message": text, "node": text})
    output = OutputStatus(digest=DIGEST, prefix="p").model_copy(update={"adapter": text, "report": text})
    return FAILED.model_copy(update={"message": text, "attempts": (attempt,), "output": output})


def dashboard(text: str) -> str:
    job = make_job(FAILED)
    shown = render_dashboard(
        type(job)(job.ref, job.uid, job.created_at, status_with(text), job.raw), LossHistory(), NOW, details=True
    )
    return printed(lambda console: console.print(shown, soft_wrap=True))


def event_table(text: str) -> str:
    found = [events.parse_event(make_event("Pod a", 1, text, message=text, type=text))]
    return printed(lambda console: console.print(events.tabulate(found, NOW), soft_wrap=True))


def answers(text: str) -> str:
    turn = ChatTurn.model_construct(question=text, replies=(Reply.model_construct(by=text, text=text, complete=True),))
    return printed(lambda console: ChatPrinter(console, questions=True).show(turn))


def noted(text: str) -> str:
    return printed(lambda console: LineScreen(console).note(f"training row 1:\n{text}"))


def described(text: str) -> str:
    job = make_job(FAILED)
    return printed(
        lambda console: wait._print(
            console, wait.describe_end(type(job)(job.ref, job.uid, job.created_at, status_with(text), job.raw))
        )
    )


def manifest_error(text: str) -> str:
    value = json.dumps(text)
    try:
        [document] = parse_documents(JOB.replace("uri: hf://organization/name", f"uri: {value}\n    {value}: 1"), text)
        parse_manifest(document, COMMON_RULES)
    except (ManifestError, YamlError) as error:
        return str(error)
    raise AssertionError


def duplicate_key(text: str) -> str:
    value = json.dumps(text)
    [document] = parse_documents(f"{value}: 1\n{value}: 2\n", text)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(document, COMMON_RULES)
    [problem] = (problem for problem in caught.value.problems if "duplicate key" in str(problem))
    return str(problem)


def merged(text: str) -> str:
    report = MergeReport.model_construct(difference=None)
    return printed(lambda console: show_merged(MergedFolder.model_construct(folder=text, merge=report), console))


def operator_status(text: str) -> str:
    ended = Attempt(number=1, job="j").model_copy(update={"message": text})
    decision = Decision(Phase.FAILED, Reason.S3_DENIED, text, attempt=ended)
    status = derive_status(QLoRAJobStatus(), decision, None, gpus=1, generation=1, now=NOW)
    event = build_event(OWNER, "1", status, NOW)
    stale = build_event(OWNER, "1", QLoRAJobStatus().model_copy(update={"message": text}), NOW)
    return "|".join([
        *(condition.message for condition in status.conditions), status.message or "", status.attempts[0].message,
        event["note"], stale["note"],
    ])  # fmt: skip


def failed(error: Exception, on_error: Any = exit_error_without_remedy) -> str:
    """What a command prints of an error."""

    def fail(console: Console) -> None:
        with exit_on_error(console, "stopped", on_error):
            raise error

    return printed(fail)


def cluster_error(text: str) -> str:
    """What a command prints of an answer of the API server."""
    written = io.StringIO()
    with pytest.raises(typer.Exit), contextlib.redirect_stderr(written), exit_on_cluster_error():
        raise ClusterError(text)
    return written.getvalue()


ONE_LINE: Final[dict[str, Callable[[str], str]]] = {
    "json-formatter": lambda text: JsonFormatter().format(record(text)),
    "text-formatter": lambda text: TextFormatter().format(record(text)),
    "log-line": lambda text: log_line(text.replace("\n", "")),
    "log-message": lambda text: log_line(json_line(message=text)),
    "log-message-escaped": lambda text: log_line(json.dumps({"message": text})),
    "log-field": lambda text: log_line(json_line(**{"note": text, text: 1})),
    "log-time-and-level": lambda text: log_line(json_line(time=text, level=[text])),
    "log-rank": lambda text: log_line(json_line(rank=text)),
    "archived-log": archived,
    "operator-status": operator_status,
    "wait": described,
    "attempt": lambda text: printed(
        lambda console: print_line(console, describe_attempt(status_with(text).attempts[0]))
    ),
    "stopped": lambda text: printed(lambda console: exit_interrupted(console, text)),
    "run-error": lambda text: failed(RunError(Reason.DATASET_INVALID, text), exit_error),
    "cluster-error": cluster_error,
    "read-error": lambda text: describe_read_error(text, OSError(2, "No such file or directory")),
    "duplicate-key": duplicate_key,
}
SEVERAL_LINES: Final[dict[str, Callable[[str], str]]] = {
    "log-raw": lambda text: log_line(text.replace("\n", ""), raw=True),
    "log-raw-json": lambda text: log_line(json_line(message=text), raw=True),
    "log-exception": lambda text: log_line(json_line(**traced(text))),
    "dashboard": dashboard,
    "events": event_table,
    "chat": answers,
    "prepare-note": noted,
    "manifest": manifest_error,
    "merged": merged,
    "yaml": lambda text: to_yaml({text: [text], "a": {"b": f"{text}\n{text}\n"}}),
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("show", [*ONE_LINE.values(), *SEVERAL_LINES.values()], ids=[*ONE_LINE, *SEVERAL_LINES])
def test_nothing_unprintable_is_shown(show: Callable[[str], str], text: str):
    shown = show(text)
    assert shown
    assert escape_text(shown) == shown
    assert "\r" not in shown
    shown.encode()


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("show", [*ONE_LINE.values(), *SEVERAL_LINES.values()], ids=[*ONE_LINE, *SEVERAL_LINES])
def test_no_line_is_forged(show: Callable[[str], str], text: str):
    assert not [line for line in show(text).splitlines() if line.startswith(FORGED)]


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("show", ONE_LINE.values(), ids=ONE_LINE)
def test_line_break_makes_no_line(show: Callable[[str], str], text: str):
    assert len(show(text).splitlines()) == len(show("plain").splitlines())


@pytest.mark.parametrize("text", STYLED.values(), ids=STYLED)
@pytest.mark.parametrize("show", [log_line, answers, described, event_table, dashboard, noted, merged])
def test_markup_and_emoji_codes_are_text(show: Callable[[str], str], text: str):
    assert text in show(text)


@pytest.mark.parametrize("text", STYLED.values(), ids=STYLED)
def test_error_with_markup_is_text(text: str):
    for on_error in (exit_error, exit_error_without_remedy):
        assert text in failed(RunError(Reason.DATASET_INVALID, text), on_error)


@pytest.mark.parametrize("text", [*ATTACKS.values(), *STYLED.values()], ids=[*ATTACKS, *STYLED])
def test_terminal_with_a_bar_gets_no_code_of_others(text: str):
    screen = Screen(terminal=True)
    with open_screen(screen.console) as live:
        live.note(text)
    assert isinstance(live, LiveScreen)
    assert escape_text(text).replace("\n", "\n  ").replace("\r", "") in screen.shown
    assert text == escape_text(text) or text not in screen.shown


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_console_filters_what_is_not_escaped_before(text: str):
    screen = Screen()
    screen.console.print(text)
    screen.console.print(Text(text), Panel(text, title=text))
    assert escape_text(screen.shown) == screen.shown


@pytest.mark.parametrize("text", [*ATTACKS.values(), *STYLED.values()], ids=[*ATTACKS, *STYLED])
def test_data_keeps_its_content(text: str, capsys: pytest.CaptureFixture[str]):
    value = {"key": [text, {text: f"{text}\n{text}\n"}]}
    print_data(value, OutputFormat.JSON)
    shown = capsys.readouterr().out
    assert json.loads(shown) == value
    assert escape_text(shown) == shown
    if not any("\ud800" <= character <= "\udfff" for character in text):  # YAML has none
        print_data(value, OutputFormat.YAML)
        assert yaml.safe_load(capsys.readouterr().out) == value


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_log_keeps_its_content(text: str):
    entry = json.loads(JsonFormatter().format(record(text)))
    assert (entry["message"], entry["note"]) == (text, text)


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_raw_log_line_stays_json(text: str):
    shown = log_line(json_line(message=text), raw=True)
    assert json.loads(shown.partition(" | ")[2])["message"] == text


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"message": ' + "9" * 5_000 + "}",
        '{"message": null, "level": {}, "time": [1], "exception": {"a": 1}, "rank": {}}',
        '{"message": "m", "rank": "\\u001b[2J"}',
        "nan",
    ],
)
def test_odd_log_line_is_shown(line: str):
    assert list(parse_log(LogFile(1, 0), line.encode()))
    assert escape_text(log_line(line)) == log_line(line)


def test_columns_stay_aligned():
    shown = printed(lambda console: console.print(render_columns(("A", "B"), [("\x1b[31mx", "1"), ("y", "2")])))
    assert shown.splitlines() == ["A           B", r"\x1b[31mx   1", "y           2"]


def test_plain_output_is_filtered(capsys: pytest.CaptureFixture[str]):
    for text in ATTACKS.values():
        echo(text)
        echo(text, err=True)
    out, err = capsys.readouterr()
    assert escape_text(out) == out == err


SCRIPT: Final = """
import logging, sys
from qlora_cli import __main__ as cli
from qlora_cli.commands import list as module

def fail() -> None:
    logging.getLogger("library").warning("warned \x1b[31m")
    raise ValueError("a row: \x1b]52;c;eA==\x07")

module.list_jobs = fail
sys.argv = ["qlora", "list"]
cli.run_app()
"""


def test_traceback_and_warnings_are_filtered():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert r"warned \x1b[31m" in done.stderr
    assert done.stderr.endswith(r"ValueError: a row: \x1b]52;c;eA==\x07" + "\n")
    assert "\x1b" not in done.stderr + done.stdout
