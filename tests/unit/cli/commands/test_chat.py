"""`qlora chat` with the real trainer on a tiny model: questions from options, from a pipe and from a person."""

import json

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Invocation

from qlora_api.local_requests import ChatTurn, Reply
from qlora_cli.__main__ import app
from qlora_cli.commands import chat
from tests.unit.cli.make import command_lines
from tests.unit.trainer.data.test_chat_template import CHATML
from tests.unit.trainer.tiny import write_model
from tests.unit.trainer.trained import PLAIN, write_published
from tests.unit.trainer.tuned import NF4

# peft 0.21 reads transformers' old name of is_activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model):
    """One that was trained on instructions, and one on chats."""
    colours = write_published(model.parent / "colours", model, PLAIN, NF4, job="colours", digest="1" * 16)
    talker = write_published(
        model.parent / "talker", model, PLAIN, NF4, seed=4, job="talker", digest="2" * 16, format="chat"
    )
    (talker / "chat_template.jinja").write_text(CHATML)
    return colours, talker


def qlora(adapters, *arguments: object, typed: str = "") -> Invocation:
    options = [option for adapter in adapters for option in ("--adapter", str(adapter))]
    command = ["chat", *options, "--max-tokens", "4", *map(str, arguments)]
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, command, input=typed)


def exchanges(result: Invocation) -> list[ChatTurn]:
    assert result.exit_code == 0, result.output
    return [ChatTurn.model_validate_json(line) for line in result.stdout.splitlines()]


@pytest.fixture
def person(monkeypatch):
    """Somebody at a terminal."""

    class Terminal:
        stdin = type("Stdin", (), {"isatty": lambda _: True})()

    monkeypatch.setattr(chat, "sys", Terminal)


def test_base_and_adapters_answer_side_by_side(model, adapters):
    result = qlora(adapters, "--ask", "What colour has the sky?", "--device", "cpu")
    assert result.exit_code == 0, result.output
    *unverified, shown = command_lines(result.stderr)
    assert [line.partition(";")[0] for line in unverified] == [
        f"{path.parent.name}: file://{path}" for path in adapters
    ]
    assert all("NOT verified: no manifest.json above it" in line for line in unverified)
    assert shown == f"file://{model} in 4 bits (nf4, double quantization), with colours, talker"
    lines = [line.split("  ")[0] for line in result.stdout.splitlines() if line[:1].strip()]
    assert lines == ["question", "base", "colours", "talker"]


def test_each_line_of_stdin_is_a_separate_question(adapters):
    piped = exchanges(qlora(adapters, "-o", "json", typed="What?\n\n  Why?  \nWhat?\n"))
    asked = exchanges(qlora(adapters, "-o", "json", "--ask", "What?", "--ask", "Why?"))
    assert [exchange.question for exchange in piped] == ["What?", "Why?", "What?"]
    assert piped == [*asked, asked[0]]
    assert [reply.by for reply in piped[0].replies] == ["base", "colours", "talker"]


@pytest.mark.usefixtures("person")
def test_interactive_chat_keeps_history_until_quit(adapters):
    typed = "What?\n\nWhat?\n/new\nWhat?\n/quit\nnever asked\n"
    result = qlora(adapters, "-o", "json", typed=typed)
    assert result.stderr.splitlines()[-1] == "/quit or Ctrl-D quits, /new clears the history"
    first, second, third = (
        ChatTurn.model_validate(json.loads(line.replace("> ", "")))
        for line in result.stdout.splitlines()
        if "question" in line
    )
    assert first == third
    assert first.replies[:2] == second.replies[:2]
    assert first.replies[2] != second.replies[2]


@pytest.mark.usefixtures("person")
def test_failing_question_does_not_end_interactive_chat(adapters):
    result = qlora(adapters[:1], typed='{"instruction": 7}\nWhat?\n')
    assert result.exit_code == 0, result.output
    assert "error: the question: field 'instruction' is a number (7), not text; write a string\n" in result.stderr
    assert "colours" in result.stdout


def test_failing_question_ends_piped_chat(adapters):
    result = qlora(adapters[:1], typed='{"instruction": 7}\nWhat?\n')
    assert (result.exit_code, result.stdout) == (1, "")


def test_truncated_answer_is_marked(capsys):
    replies = (Reply(by="base", text=" On and on", complete=False), Reply(by="[bot]", text="Done.", complete=True))
    chat.ChatPrinter(chat.Console(width=60), questions=False).show(ChatTurn(question="?", replies=replies))
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "base   On and on …",
        "[bot]  Done.",
        "",
    ]


def test_cuda_device_without_gpu_is_an_error(adapters, monkeypatch):
    monkeypatch.setattr(chat, "cuda_available", lambda: False)
    result = qlora(adapters, "--device", "cuda", "--ask", "What?")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: --device is cuda, but PyTorch finds no CUDA device on this machine; use --device cpu\n"
    )


def test_adapters_that_cannot_be_asked_together_are_one_sentence(adapters):
    result = qlora([adapters[0], adapters[0]], "--ask", "What?")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --adapter: ")
    assert result.stderr.endswith("are the same adapter; give it once\n")
