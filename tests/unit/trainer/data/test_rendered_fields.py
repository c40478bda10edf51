"""Chat rows: all that a row says is in what the template renders, or the row is refused with the field."""

import json

import pytest

from qlora_api.runconfig import Platform
from qlora_trainer.data.chat_template import encode_chats, load_chat_template
from qlora_trainer.data.dataset import open_dataset, scan_rows
from qlora_trainer.data.row_encoder import RowEncoder
from qlora_trainer.data.row_formats import parse_row
from qlora_trainer.data.rows import RowError
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.data.tokenized_dataset import tokenize_dataset
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from tests.unit.trainer.tiny import make_spec, make_tokenizer, write_rows

PLAIN = (  # knows roles and contents only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CALLS = (
    "{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }}: {{ c.function.arguments | tojson }}</call>"
    "{%- endfor %}"
)
TOOLS = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + _CALLS + "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_ARGUMENTS = TOOLS.replace("': ' }}{{ c", "").replace(
    "{{ c.function.name }}: {{ c.function.arguments | tojson }}", "{{ c.function.name + ': ' + c.function.arguments }}"
)
PRINTED_ARGUMENTS = TOOLS.replace("c.function.arguments | tojson", "c.function.arguments")
THOUGHTS = (  # like Qwen3: thoughts before the last question are left out, and the last answer always has some
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% set said = m.content %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ said }}" + _CALLS.replace("{%-", "{%") + "{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
STRIPPED = (  # like DeepSeek-R1's: thoughts are left out of every answer, and the prompt begins one
    "{%- for m in messages %}{% if m.role == 'assistant' %}<|bot|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{%- else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|user|>", "<|bot|>"]})
    return tokenizer


def user(content="Weather in Rome?", **more):
    return {"role": "user", "content": content, **more}


def said(content="It is sunny.", **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments, **more):
    return (
        said(None, tool_calls=[{"type": "function", "function": {"name": "get_weather", "arguments": arguments}}])
        | more
    )


RESULT = {"role": "tool", "content": "sunny"}


def encode(tokenizer, source, messages, loss="auto", **fields):
    chat = parse_row({"messages": messages, **fields}, "chat")
    (row,) = encode_chats([chat], load_chat_template(tokenizer, source), loss)
    return row


def label_texts(tokenizer, row):
    """Return the texts that are learned, of each row that the conversation became."""
    assert isinstance(row, TokenRow), row
    return [
        [tokenizer.decode(part.input_ids[start:end]) for start, end in part.label_spans] for part in (*row.earlier, row)
    ]


@pytest.mark.parametrize(
    ("source", "messages", "fields", "field"),
    [
        pytest.param(PLAIN, [user(), call({"city": "Rome"})], {}, "messages[1].tool_calls is", id="calls"),
        pytest.param(PLAIN, [user(), said()], {"tools": [WEATHER]}, "field 'tools' is", id="tools"),
        pytest.param(PLAIN, [user(), said(reasoning_content="Sun?")], {}, "messages[1].reasoning_content", id="think"),
        pytest.param(PLAIN, [user(name="Alice"), said()], {}, "messages[0].name", id="name"),
        pytest.param(PLAIN, [user(), said(), user("Why?"), said(plan="sum")], {}, "messages[3].plan", id="any-field"),
        pytest.param(PLAIN, [user(), said(steps=[{"do": "look"}])], {}, "messages[1].steps", id="nested-field"),
        pytest.param(
            TOOLS.replace("tool | tojson", "tool.function.name"), [user(), said()], {"tools": [WEATHER]},
            "field 'tools' (description)", id="part-of-a-tool",
        ),
        pytest.param(
            TOOLS.replace(": {{ c.function.arguments | tojson }}", ""), [user(), call({"city": "Rome"})], {},
            "messages[1].tool_calls (arguments)", id="part-of-a-call",
        ),
        pytest.param(
            "{% for m in messages if m.role != 'tool' %}{{ m.role }}{{ m.content }}" + _CALLS + "{% endfor %}",
            [user(), call({"city": "Rome"}), RESULT, said()], {}, "messages[2].content", id="tool-result",
        ),
        pytest.param(
            PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
            [{"role": "system", "content": "Be brief."}, user(), said()], {}, "messages[0].content", id="system",
        ),
        pytest.param(
            TOOLS.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
            [user(), call({"city": "Rome"}, content="I look.")], {}, "messages[1].content", id="text-beside-a-call",
        ),
        pytest.param(STRIPPED, [user(), said(reasoning_content="Sun?")], {}, "[1].reasoning_content", id="r1-field"),
    ],
)  # fmt: skip
def test_field_that_the_template_drops_is_refused(tokenizer, source, messages, fields, field):
    row = encode(tokenizer, source, messages, **fields)
    assert isinstance(row, RowError), label_texts(tokenizer, row)
    assert field in str(row)
    assert "is dropped by the model's chat template; set spec.dataset.chatTemplate, use another model, or leave" in str(
        row
    )


def test_identifiers_and_flags_of_messages_may_be_dropped(tokenizer):
    messages = [user(id="m1", timestamp="2024-07-26", toxic=False), said(name=None, annotations=[], score=0.9)]
    assert label_texts(tokenizer, encode(tokenizer, PLAIN, messages)) == [["It is sunny.<|im_end|>"]]
    answered = [user(), call({"city": "Rome"}), {**RESULT, "name": "get_weather", "tool_call_id": "c1"}, said()]
    assert isinstance(encode(tokenizer, TOOLS, answered), TokenRow)


def test_content_that_the_template_writes_as_json_or_in_capitals_is_not_dropped(tokenizer):
    source = TOOLS.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content | upper }}")
    messages = [user(), call({"city": "Rome"}), {**RESULT, "content": '{"sky": "blü"}'}, said()]
    assert isinstance(encode(tokenizer, source, messages), TokenRow)


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'], ids=["object", "text"])
@pytest.mark.parametrize("source", [TOOLS, TEXT_ARGUMENTS, PRINTED_ARGUMENTS], ids=["tojson", "text", "printed"])
def test_arguments_are_encoded_once_as_the_template_takes_them(tokenizer, source, arguments):
    row = encode(tokenizer, source, [user(), call(arguments)], tools=[WEATHER])
    assert label_texts(tokenizer, row) == [['<call>get_weather: {"city": "Rome"}</call><|im_end|>']]


def test_thoughts_of_every_answer_have_labels_though_the_template_strips_earlier_ones(tokenizer):
    row = encode(
        tokenizer, THOUGHTS,
        [user("2+2?"), said("<think>\nadd\n</think>\n\nFour."), user("3+3?"), said("<think>\nmore\n</think>\n\nSix.")],
    )  # fmt: skip
    assert label_texts(tokenizer, row) == [
        ["<think>\nadd\n</think>\n\nFour.<|im_end|>"],
        ["<think>\nmore\n</think>\n\nSix.<|im_end|>"],
    ]
    assert "add" not in tokenizer.decode(row.input_ids), "the context is what a server renders"


def test_reasoning_content_has_labels(tokenizer):
    messages = [user("2+2?"), said("Four.", reasoning_content="add"), user("3+3?"), said("Six.", reasoning_content="m")]
    assert label_texts(tokenizer, encode(tokenizer, THOUGHTS, messages)) == [
        ["<think>\nadd\n</think>\n\nFour.<|im_end|>"],
        ["<think>\nm\n</think>\n\nSix.<|im_end|>"],
    ]


def test_calls_without_thoughts_that_the_template_renders_otherwise_when_they_are_last_stay_in_one_row(tokenizer):
    row = encode(tokenizer, THOUGHTS, [user(), call({"city": "Rome"}), RESULT, said()], tools=[])
    assert label_texts(tokenizer, row) == [
        ['<call>get_weather: {"city": "Rome"}</call><|im_end|>', "<think>\n\n</think>\n\nIt is sunny.<|im_end|>"]
    ]


def test_earlier_answer_without_thoughts_needs_no_row_of_its_own(tokenizer):
    row = encode(tokenizer, THOUGHTS, [user("Hi"), said("Ho"), user("3+3?"), said("<think>\nmore\n</think>\n\nSix.")])
    assert label_texts(tokenizer, row) == [["Ho<|im_end|>", "<think>\nmore\n</think>\n\nSix.<|im_end|>"]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param("<think>\nadd\n</think>\n\nFour.", "add\n</think>\n\nFour.<|im_end|>", id="thoughts"),
        pytest.param("Four.", "Four.<|im_end|>", id="none"),
    ],
)
def test_thoughts_that_the_template_always_strips_follow_its_prompt(tokenizer, content, expected):
    row = encode(tokenizer, STRIPPED, [user("2+2?"), said(content)])
    assert label_texts(tokenizer, row) == [[expected]]
    if "think" in content:
        assert tokenizer.decode(row.input_ids).count("<think>") == 1
        assert row.input_ids[: len(row.prompt_ids)] == row.prompt_ids


def test_every_answer_has_labels_where_the_template_always_strips_thoughts(tokenizer):
    thought = "<think>\nadd\n</think>\n\n"
    row = encode(tokenizer, STRIPPED, [user("2+2?"), said(thought + "Four."), user("3+3?"), said(thought + "Six.")])
    assert label_texts(tokenizer, row) == [
        ["add\n</think>\n\nFour.<|im_end|>"], ["add\n</think>\n\nSix.<|im_end|>"]
    ]  # fmt: skip


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}])
def test_answer_with_weight_zero_has_no_labels(tokenizer, flag):
    messages = [user("q1"), said("WRONG", **flag), user("again"), said("RIGHT", weight=1)]
    assert label_texts(tokenizer, encode(tokenizer, PLAIN, messages)) == [["RIGHT<|im_end|>"]]
    everything = "".join(*label_texts(tokenizer, encode(tokenizer, PLAIN, messages, "all")))
    assert "WRONG" not in everything
    assert "again" in everything


def test_last_answer_with_weight_zero_has_neither_labels_nor_stop_token(tokenizer):
    row = encode(tokenizer, PLAIN, [user("q1"), said("RIGHT"), user("again"), said("WRONG", weight=0)])
    assert label_texts(tokenizer, row) == [["RIGHT<|im_end|>"]]
    refused = encode(tokenizer, PLAIN, [user("q1"), said("RIGHT"), user("x"), said("WRONG", weight=0)], "completion")
    assert "messages[3] has the weight 0" in str(refused)


def test_only_the_completion_of_messages_has_labels(tokenizer):
    prompt = [user("q1"), said("a1"), user("q2")]
    chat = parse_row({"prompt": prompt, "completion": [said("a2")]}, "chat")
    (row,) = encode_chats([chat], load_chat_template(tokenizer, PLAIN), "auto")
    assert label_texts(tokenizer, row) == [["a2<|im_end|>"]]


def test_model_with_templates_by_name_uses_the_one_for_tools(tokenizer):
    tokenizer.chat_template = {"default": PLAIN, "tool_use": TOOLS}
    try:
        template = load_chat_template(tokenizer, None)
    finally:
        tokenizer.chat_template = None
    chats = [
        parse_row({"messages": [user(), call({"city": "Rome"})], "tools": [WEATHER]}, "chat"),
        parse_row({"messages": [user(), said()]}, "chat"),
    ]
    tools, plain = encode_chats(chats, template, "auto")
    assert json.dumps(WEATHER) in tokenizer.decode(tools.input_ids)
    assert label_texts(tokenizer, plain) == [["It is sunny.<|im_end|>"]]


def test_label_begins_where_the_answer_does_though_prompt_and_answer_differ(tokenizer):
    """The prompt begins a thought, and an answer that has none does not go on with it."""
    source = STRIPPED.replace("m.content.split", "_CALLS_m.content.split").replace(
        "{{ _CALLS_",
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}{{ ",
    )
    row = encode(tokenizer, source, [user(), call({"city": "Rome"})])
    assert label_texts(tokenizer, row) == [['[get_weather {"city": "Rome"}]<|im_end|>']]


def test_shape_of_messages_is_tried_once(tokenizer, monkeypatch):
    """What a template renders is tried by rendering again, which must not double the time of every row."""
    from qlora_trainer.data.chat_renderer import ChatRenderer  # noqa: PLC0415 (patched below)

    calls, apply = [], ChatRenderer._apply
    monkeypatch.setattr(ChatRenderer, "_apply", lambda *found, **more: calls.append(1) or apply(*found, **more))
    renderer = ChatRenderer(TOOLS, tokenizer.special_tokens_map, "<|im_end|>")
    chat = parse_row({"messages": [user(), call({"city": "Rome"}), RESULT, said()], "tools": [WEATHER]}, "chat")
    renderer.render(chat)
    first = len(calls)
    renderer.render(chat)
    assert len(calls) - first < first / 2


def test_chats_that_the_template_drops_or_splits_are_counted(tokenizer, tmp_path):
    def thought(number):
        return said(f"<think>\n{number}\n</think>\n\nYes.")

    rows = [{"messages": [user(f"{n}?"), thought(n), user("Sure?"), thought(n)]} for n in range(10)]
    rows.append({"messages": [user("x?"), said(plan="none")]})
    uri = write_rows(tmp_path / "rows.jsonl", rows)
    spec = make_spec("file:///m", uri, "file:///o", dataset={"onInvalidRow": "drop"}, training={"maxLength": 512})
    dataset = open_dataset(spec, SourceResolver(Platform(), environment_secrets()), tmp_path)
    encoder = RowEncoder(tokenizer, "auto", load_chat_template(tokenizer, THOUGHTS))
    scan = scan_rows(dataset, 0.2)
    with tokenize_dataset(dataset, scan, encoder, spec.training, tmp_path / "work") as made:
        status, rejected = made.status, made.rejected
    assert (status.split_rows, status.training_rows + status.evaluation_rows) == (10, 20)
    assert (status.invalid_rows, status.invalid_row_numbers) == (1, ("row 11",))
    assert "messages[1].plan is dropped" in rejected.first[0][1]
