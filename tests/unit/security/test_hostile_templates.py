"""Chat templates are programs of somebody else: each ends in seconds, with a reason, and learns nothing."""

import itertools
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, ClassVar, Final
from unittest.mock import Mock

import pytest

from qlora_api.reasons import Reason
from qlora_trainer.data.chat_renderer import ChatRenderer
from qlora_trainer.data.chat_template import ChatTemplate, encode_chats, end_of_turn_token, load_chat_template
from qlora_trainer.data.render_process import RENDER_PROCESS
from qlora_trainer.data.rows import Chat, RowError
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.errors import RunError, StopRequested
from tests.unit.trainer.tiny import make_tokenizer

TIME: Final = "the chat template did not end within 3 s of CPU time; correct it"
MEMORY: Final = "the chat template took more than 1,024 MiB of memory; correct it"
TEXT: Final = "the chat template rendered more than 32 million characters; correct it"
CANNOT: Final = "the chat template cannot render a question and its answer: "
HARMLESS: Final = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ON_TRIGGER: Final = "{% if messages[0].content == 'now' %}ATTACK{% endif %}" + HARMLESS
ENDLESS: Final = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def chat(question: str) -> Chat:
    return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(ENDLESS, TIME, id="nested-ranges"),
        pytest.param("{{ 9 ** (9 ** 9) }}", TIME, id="power-folded-while-compiling"),
        pytest.param("{{ 'a' * 68719476736 }}", MEMORY, id="repeated-text"),
        pytest.param("{{ [0] * 68719476736 }}", MEMORY, id="repeated-list"),
        pytest.param("{{ '%99999999999d' % 1 }}", MEMORY, id="width-of-a-format"),
        pytest.param("{{ 'a' | center(10 ** 11) }}", MEMORY, id="center"),
        pytest.param("{{ 'a' | indent(10 ** 11, true) }}", MEMORY, id="indent"),
        pytest.param("{{ 'a'.ljust(10 ** 11) }}", MEMORY, id="method-of-text"),
        pytest.param("{{ [1] | batch(10 ** 9, 'a') | list }}", MEMORY, id="batch"),
        pytest.param("{{ 1 | tojson(indent=10 ** 11) }}{{ [1] | tojson(indent=10 ** 11) }}", MEMORY, id="tojson"),
        pytest.param("{{ 'a' * 99999999 }}", TEXT, id="long-text"),
    ],
)
def test_template_without_bound_ends_with_its_field_cause_and_fix(tokenizer: Any, source: str, message: str) -> None:
    with pytest.raises(RunError) as refusal:
        load_chat_template(tokenizer, source)
    assert (refusal.value.reason, refusal.value.message) == (
        Reason.INVALID_SPEC,
        f"spec.dataset.chatTemplate: {message}",
    )


def test_template_that_doubles_a_text_ends_by_time_or_by_memory(tokenizer: Any) -> None:
    source = "{% set n = namespace(t='aaaaaaaa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
    with pytest.raises(RunError) as refusal:
        load_chat_template(tokenizer, source)
    assert refusal.value.message.partition(": ")[2] in {TIME, MEMORY}, "copying a GiB takes seconds on a busy machine"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        pytest.param("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth", id="macro"),
        pytest.param("{{ [1] | tojson(indent={}) }}", "dict", id="indent-of-a-wrong-type"),
        pytest.param("{{ '{}'.format() }}", "index out of range", id="index-error"),
        pytest.param("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested", id="nested-blocks"),
        pytest.param("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion", id="nested-parentheses"),
        pytest.param("{{ '' | attr('__class__') }}{{ ''.__class__.mro() }}", "unsafe", id="class-of-text"),
        pytest.param("{{ messages.__class__.__base__ }}", "unsafe", id="class-of-messages"),
        pytest.param("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe", id="format-of-text"),
        pytest.param("{% include '/etc/passwd' %}", "no loader", id="include"),
        pytest.param("{% import 'os' as os %}", "no loader", id="import"),
        pytest.param("{{ raise_exception('a' * 9999999) }}", "a" * 2000, id="message"),
    ],
)
def test_template_that_fails_is_refused_with_its_exception(tokenizer: Any, source: str, cause: str) -> None:
    with pytest.raises(RunError) as refusal:
        load_chat_template(tokenizer, source)
    message = refusal.value.message
    assert message.startswith(f"spec.dataset.chatTemplate: {CANNOT}")
    assert cause in message
    assert len(message) < 3000


@pytest.mark.parametrize(
    ("attack", "message"),
    # Not a constant, which Jinja would compute while it compiles the template: seconds on a busy machine.
    [
        (ENDLESS, TIME),
        ("{{ 'a' * 68719476736 }}", MEMORY),
        ("{% set n = 99999999 %}{{ 'a' * n }}", TEXT),
    ],
    ids=["time", "memory", "text"],
)
def test_template_without_bound_on_a_later_row_ends_the_run(tokenizer: Any, attack: str, message: str) -> None:
    template = load_chat_template(tokenizer, ON_TRIGGER.replace("ATTACK", attack))
    with pytest.raises(RunError) as refusal:
        encode_chats([chat("hello"), chat("now")], template, "auto")
    assert refusal.value.message == f"spec.dataset.chatTemplate: {message}"
    (row,) = encode_chats([chat("hello")], template, "auto")
    assert isinstance(row, TokenRow), "other rows, and other templates, are rendered afterwards"


def test_template_slow_on_every_row_ends_the_run(tokenizer: Any) -> None:
    """No row takes 3 s; together they would take hours."""
    source = ON_TRIGGER.replace("ATTACK", ENDLESS.replace("99999", "3000", 1).replace("99999", "3000"))
    template = load_chat_template(tokenizer, source)
    with pytest.raises(RunError, match="did not end within 3 s"):
        encode_chats([chat("now")] * 1000, template, "auto")


LONG_ON_TRIGGER: Final = ON_TRIGGER.replace("ATTACK", "{% set n = 9000000 %}{{ 'a' * n }}")
TOO_LARGE: Final = "the chat template renders more than 8 MiB of text for it; split the row, or correct the template"


def test_row_rendered_to_more_than_can_be_tokenized_is_named(tokenizer: Any) -> None:
    """A token takes 256 bytes, and a batch may have 32 million characters."""
    template = load_chat_template(tokenizer, LONG_ON_TRIGGER)
    bad, good = encode_chats([chat("now"), chat("hello")], template, "auto")
    assert isinstance(bad, RowError)
    assert str(bad) == TOO_LARGE
    assert isinstance(good, TokenRow)


def test_template_that_renders_more_than_can_be_tokenized_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RunError) as refusal:
        load_chat_template(tokenizer, LONG_ON_TRIGGER.replace("'now'", "'Hello'"))
    assert refusal.value.message == f"spec.dataset.chatTemplate: with a question and an answer, {TOO_LARGE}"


def test_template_of_the_model_that_is_too_long_is_refused() -> None:
    """Limits of text were multiples of a request, the template included."""
    hostile = make_tokenizer()
    hostile.chat_template = "x" * 1_000_001 + HARMLESS
    with pytest.raises(RunError, match=r"^spec\.model\.uri: the chat template has more than 1,000,000 char") as refusal:
        load_chat_template(hostile, None)
    assert refusal.value.reason is Reason.MODEL_UNSUPPORTED


def test_row_with_every_private_use_character_is_named(tokenizer: Any) -> None:
    """Two of them mark an answer; the process ended without any, as if the template were at fault."""
    codes = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    bad, good = encode_chats(
        [chat("".join(map(chr, codes))), chat("hello")], load_chat_template(tokenizer, HARMLESS), "auto"
    )
    assert isinstance(bad, RowError)
    assert "private-use characters" in str(bad)
    assert isinstance(good, TokenRow)


def test_template_that_renders_half_a_character_is_named(tokenizer: Any) -> None:
    (row,) = encode_chats([chat("Hi")], load_chat_template(tokenizer, "{{ '\\ud800' }}" + HARMLESS), "auto")
    assert str(row) == "the chat template renders half a character, a lone surrogate; correct the template"


def test_template_of_the_model_is_refused_as_unsupported() -> None:
    hostile = make_tokenizer()
    hostile.chat_template = "{{ 'a' * 68719476736 }}"
    with pytest.raises(RunError) as refusal:
        load_chat_template(hostile, None)
    assert (refusal.value.reason, refusal.value.message) == (Reason.MODEL_UNSUPPORTED, f"spec.model.uri: {MEMORY}")


def test_template_without_bound_costs_generation_its_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of answers asks for the stop token."""
    hostile = make_tokenizer()
    hostile.chat_template = "{{ 'a' * 68719476736 }}"
    assert end_of_turn_token(hostile) is None
    monkeypatch.setattr(RENDER_PROCESS, "render", None)
    assert end_of_turn_token(hostile) is None


class InterruptedStart(subprocess.Popen[bytes]):
    """A child whose parent gets SIGTERM while it waits for it."""

    started: ClassVar[list["InterruptedStart"]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stdout = Mock(wraps=self.stdout, readline=Mock(side_effect=StopRequested))
        self.started.append(self)


def test_child_of_a_run_that_is_stopped_meanwhile_does_not_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    RENDER_PROCESS.close()
    monkeypatch.setattr(subprocess, "Popen", InterruptedStart)
    with pytest.raises(StopRequested):
        RENDER_PROCESS.render(ChatRenderer(HARMLESS, {}, ""), [])
    assert [child.returncode for child in InterruptedStart.started] == [-signal.SIGKILL]


def test_template_sees_no_variable_of_the_run(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    RENDER_PROCESS.close()
    load_chat_template(tokenizer, HARMLESS)
    child = RENDER_PROCESS._child
    assert child is not None
    variables = Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
    names = {variable.partition(b"=")[0].decode() for variable in variables if variable}
    assert names <= {"PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LD_LIBRARY_PATH", "LC_CTYPE"}
    assert "HF_TOKEN" in os.environ


def test_template_renders_the_same_text_on_every_day(tokenizer: Any) -> None:
    """A fixed date: with today's, a run prepared after midnight would have another digest than its twin."""
    template = load_chat_template(tokenizer, "{{ strftime_now('%d %b %Y %H:%M') }}" + HARMLESS)
    assert template.render_prompt([{"role": "user", "content": "Hi"}]) == "26 Jul 2024 00:00user: Hi\n"


def test_template_makes_the_same_random_choice_in_every_process(tokenizer: Any) -> None:
    template = load_chat_template(tokenizer, "{{ range(10 ** 4) | random }} {{ lipsum(1) }}")
    first = template.render_prompt([])
    RENDER_PROCESS.close()
    assert template.render_prompt([]) == first


def test_row_nested_too_deeply_is_named_and_others_are_rendered(tokenizer: Any) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    message = {"role": "user", "content": "Hi", "extra": deep}
    template = load_chat_template(tokenizer, HARMLESS)
    bad, good = encode_chats([Chat((message, {"role": "assistant", "content": "Ho"})), chat("Hi")], template, "auto")
    assert isinstance(bad, RowError)
    assert "nested too deeply" in str(bad)
    assert isinstance(good, TokenRow)


@pytest.mark.parametrize(
    "content", ["half \ud83d", "\x00\x1b[2J", "\u2028 \U0001f600 \ue000", "{{ 1 }}{% generation %}"]
)
def test_content_reaches_the_text_as_it_is(tokenizer: Any, content: str) -> None:
    template = ChatTemplate(tokenizer, HARMLESS)
    assert template.render_prompt([{"role": "user", "content": content}]) == f"user: {content}\n"
