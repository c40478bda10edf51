"""Parts of a conversation: what each answer is learned from, where the template renders it otherwise later."""

import pytest

from qlora_trainer.data.chat_renderer import ChatRenderer
from qlora_trainer.data.render_process import RENDER_PROCESS, Call
from qlora_trainer.data.row_formats import parse_row
from qlora_trainer.data.rows import RowError

LAST_SYSTEM = (  # like Mistral-7B-v0.3 and Nemo: the system message is before the question only where that is last
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set found = messages[1:] %}"
    "{% else %}{% set found = messages %}{% endif %}<s>"
    "{% for m in found %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[CALLS] {{ m.tool_calls | tojson }}</s>"
    "{% elif m.role == 'tool' %}[RESULT] {{ m.content }}[/RESULT]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
THOUGHTS = (  # like Qwen3: the last answer has thoughts, also empty ones; earlier ones where they follow the question
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>{{ thought }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}{% for c in m.tool_calls or [] %}<call>{{ c | tojson }}</call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
ALWAYS_EMPTY = (  # like Nemotron 3: the prompt begins a thought, and an answer without one has an empty one
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think></think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c | tojson }}</call>{% endfor %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}<think>{{ '\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be nice."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {"at": "sky"}}]}
RESULT = {"role": "tool", "content": "blue"}
THOUGHT = "<think>hmm</think>"


def user(content="Sky?"):
    return {"role": "user", "content": content}


def said(content="Blue.", **more):
    return {"role": "assistant", "content": content, **more}


def render(source, messages, stop="<|im_end|>", **options):
    return ChatRenderer(source, {}, stop).render(parse_row({"messages": messages}, "chat"), **options)


def labels(part):
    return [part.text[start:end] for start, end in part.assistant_spans]


def test_system_message_that_only_the_prompt_has_is_before_the_answer():
    (part,) = render(LAST_SYSTEM, [SYSTEM, user(), said()], "</s>")
    assert part.text == "<s>[INST] Be nice.\n\nSky?[/INST] Blue.</s>"
    assert labels(part) == [" Blue.</s>"]
    assert part.prompt + labels(part)[0] == part.text


def test_system_message_that_only_the_last_prompt_has_leaves_a_conversation_one_row():
    (part,) = render(LAST_SYSTEM, [SYSTEM, user(), said("Hm."), user("And?"), said()], "</s>")
    assert part.text == "<s>[INST] Sky?[/INST] Hm.</s>[INST] Be nice.\n\nAnd?[/INST] Blue.</s>"
    assert labels(part) == ["Hm.</s>", " Blue.</s>"]


def test_system_message_that_only_the_first_prompt_has_is_before_that_answer():
    first, whole = render(LAST_SYSTEM, [SYSTEM, user(), CALLING, RESULT, said()], "</s>")
    assert first.text.startswith("<s>[INST] Be nice.\n\nSky?[/INST][CALLS] ")
    assert [text[:7] for text in labels(first)] == ["[CALLS]"]
    assert labels(whole) == [" Blue.</s>"]


def test_system_message_that_no_prompt_has_is_refused():
    source = LAST_SYSTEM.replace("loop.last and system", "not messages and system")
    with pytest.raises(RowError, match=r"messages\[0\].content is dropped by the model's chat template"):
        render(source, [SYSTEM, user(), said("Hm."), user("And?"), said()], "</s>")


@pytest.mark.parametrize("source", [THOUGHTS, ALWAYS_EMPTY])
def test_trace_of_calls_without_thoughts_stays_one_row(source):
    (part,) = render(source, [user(), CALLING, RESULT, CALLING, RESULT, said()])
    assert [text.count("<call>") for text in labels(part)] == [1, 1, 0]
    assert all(text.endswith("<|im_end|>") and "blue" not in text for text in labels(part))


@pytest.mark.parametrize("source", [THOUGHTS, ALWAYS_EMPTY])
def test_mark_in_a_row_is_a_character_like_any_other(source):
    marks = "\ue000 \ue001"
    (part,) = render(source, [user(f"Press {marks}, my key is X."), said(f"Hm {marks}."), user(marks), said()])
    assert [text[-15:] for text in labels(part)] == [f"Hm {marks}.<|im_end|>"[-15:], "Blue.<|im_end|>"]
    assert "X." not in "".join(labels(part))


def test_system_message_with_a_mark_is_refused_like_any_other_that_is_dropped():
    source = THOUGHTS.replace("{% for m in messages %}<", "{% for m in messages if m.role != 'system' %}<")
    with pytest.raises(RowError, match=r"messages\[0\].content is dropped"):
        render(source, [{"role": "system", "content": "Be \ue000 \ue001."}, user("\ue000\ue001"), said()])


def test_thoughts_of_equal_answers_each_have_labels():
    parts = render(THOUGHTS, [user(), said(THOUGHT + "Blue."), user(), said(THOUGHT + "Blue.")])
    assert [labels(part) for part in parts] == [[THOUGHT + "Blue.<|im_end|>"]] * 2


def test_masked_answer_before_thoughts_is_masked_in_the_loss_on_all_tokens():
    messages = [user(), said("WRONG", weight=0), user(), said(THOUGHT + "Blue.")]
    source = THOUGHTS.replace("loop.index0 > ns.last and (loop.last or thought)", "false")
    (part,) = render(source, messages, loss="all")
    assert [part.text[start:end] for start, end in part.masked_spans] == ["WRONG<|im_end|>"]


def conversation(turns, thought="", question=""):
    return [m for n in range(turns) for m in (user(f"{n}?{question}"), said(f"{thought}Answer {n}."))]


@pytest.mark.parametrize("thought", ["", THOUGHT])
def test_renderings_of_a_long_conversation_grow_with_its_answers(monkeypatch, thought):
    calls, apply = [], ChatRenderer._apply
    monkeypatch.setattr(ChatRenderer, "_apply", lambda *found, **more: calls.append(1) or apply(*found, **more))
    parts = render(THOUGHTS, conversation(60, thought))
    assert sum(len(labels(part)) for part in parts) == 60
    assert len(calls) < 60 * 8


def render_rows(source, rows):
    chats = [parse_row({"messages": messages}, "chat") for messages in rows]
    calls = [Call("render", (chat,), {"with_prompt": False}) for chat in chats]
    return RENDER_PROCESS.render(ChatRenderer(source, {}, "<|im_end|>"), calls)


def test_rows_that_become_many_are_accepted_whatever_is_beside_them():
    rows = render_rows(THOUGHTS, [conversation(50, THOUGHT, "x" * 6000)] * 10)
    assert [len(row) for row in rows] == [50] * 10


def test_row_that_becomes_too_much_text_is_refused_and_others_are_not():
    source = THOUGHTS.replace("<|im_start|>{{ m.role }}", "<|im_start|>" + "x" * 2000 + "{{ m.role }}")
    short = [user(), said()]
    first, refused, last = render_rows(source, [short, conversation(60, THOUGHT), short])
    assert len(first) == len(last) == 1
    assert "too long together; split the row" in str(refused)
