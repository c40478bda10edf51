"""Rows of every format: detection, parsing, and the errors of invalid ones."""

import pytest

from qlora_api.v1alpha1 import RowTemplate
from qlora_trainer.data.row_formats import detect_format, parse_row
from qlora_trainer.data.rows import Chat, Example, RowError, Text

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": []}, ("chat", "messages")),
        ({"id": 1, "conversations": []}, ("chat", "conversations")),
        ({"text": "…", "instruction": "x", "output": "y"}, ("instruction", "instruction")),
        ({"prompt": "x", "completion": "y"}, ("completion", "prompt")),
        ({"text": "x", "url": "y"}, ("text", "text")),
    ],
)
def test_detect_format_by_field(fields, expected):
    assert detect_format(fields) == expected


def test_unknown_fields_are_listed_with_the_known_ones():
    with pytest.raises(RowError, match=r"has the fields question, answer; write messages .* or set spec\."):
        detect_format({"question": "x", "answer": "y"})


@pytest.mark.parametrize(
    ("fields", "row_format", "expected"),
    [
        pytest.param(
            {"instruction": "Add", "output": "3"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Response:\n", "3"),
            id="instruction",
        ),
        pytest.param(
            {"instruction": "Add", "input": "1 2", "response": "3"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n", "3"),
            id="input-and-response",
        ),
        pytest.param(
            {"instruction": "Add", "context": "1 2", "response": "3"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n", "3"),
            id="context",
        ),
        pytest.param(
            {"instruction": "Add", "input": None, "output": "3", "source": "book"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Response:\n", "3"),
            id="no-input-and-other-fields",
        ),
        pytest.param(
            {"instruction": "Add", "input": " ", "output": "3"},
            "instruction",
            Example("### Instruction:\nAdd\n\n### Response:\n", "3"),
            id="blank-input",
        ),
        pytest.param({"prompt": "1+2=", "completion": "3"}, "completion", Example("1+2=", "3"), id="completion"),
        pytest.param({"text": "Once."}, "text", Text("Once."), id="text"),
        pytest.param({"messages": [ASK, ANSWER]}, "chat", Chat((ASK, ANSWER)), id="messages"),
        pytest.param(
            {"conversations": [{"from": "system", "value": "Be."}, {"from": "human", "value": "Hi"},
                               {"from": "gpt", "value": "Hello"}]},
            "chat",
            Chat(({"role": "system", "content": "Be."}, ASK, ANSWER)),
            id="sharegpt",
        ),
        pytest.param(
            {"messages": [{**ASK, "tool_calls": None, "from": None}, {**ANSWER, "name": "Bo"}], "tools": [{"a": 1}]},
            "chat",
            Chat((ASK, {**ANSWER, "name": "Bo"}), ({"a": 1},)),
            id="nulls-of-a-columnar-file-and-tools",
        ),
        pytest.param(
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]},
                          {"role": "tool", "content": "7"}, ANSWER]},
            "chat",
            Chat((ASK, {"role": "assistant", "content": "", "tool_calls": [{"x": 1}]},
                  {"role": "tool", "content": "7"}, ANSWER)),
            id="tool-call",
        ),
    ],
)  # fmt: skip
def test_parse_row_of_each_format(fields, row_format, expected):
    assert parse_row(fields, row_format) == expected


@pytest.mark.parametrize(
    ("fields", "row_format", "message"),
    [
        pytest.param({"instruction": "x"}, "instruction", "field 'response' (or 'output') is missing", id="missing"),
        pytest.param({"instruction": " ", "output": "y"}, "instruction", "field 'instruction' is empty", id="empty"),
        pytest.param({"instruction": "x", "output": 7}, "instruction", "'output' is a number (7), not text", id="int"),
        pytest.param({"instruction": "x", "output": None}, "instruction", "'output' is null, not text", id="null"),
        pytest.param({"instruction": "x", "output": float("nan")}, "instruction", "a number (nan), not text", id="nan"),
        pytest.param({"instruction": "x", "output": True}, "instruction", "is true or false", id="bool"),
        pytest.param({"instruction": "x", "output": b"y"}, "instruction", "is a bytes, not text", id="bytes"),
        pytest.param({"instruction": "x", "input": {}, "output": "y"}, "instruction", "'input' is an ob", id="input"),
        pytest.param({"instruction": "x", "output": "y", "response": "z"}, "instruction", "keep one", id="both"),
        pytest.param({"prompt": "x"}, "completion", "field 'completion' is missing; add it", id="completion"),
        pytest.param({"prompt": "x", "completion": "\udc80"}, "completion", "not UTF-8, or half a char", id="encoding"),
        pytest.param({"text": "\n"}, "text", "field 'text' is empty", id="text"),
        pytest.param({"messages": "Hi"}, "chat", "'messages' is text, not a list of messages", id="no-list"),
        pytest.param({"messages": []}, "chat", "field 'messages' is empty", id="no-messages"),
        pytest.param({"text": "x"}, "chat", "field 'messages' (or 'conversations') is missing", id="no-chat"),
        pytest.param({"messages": ["Hi"]}, "chat", "messages[0] is text, not a message", id="no-message"),
        pytest.param({"messages": [{"content": "x"}]}, "chat", "messages[0].role is missing", id="no-role"),
        pytest.param({"messages": [{"role": "bot", "content": "x"}]}, "chat", "role is 'bot'; wri", id="role"),
        pytest.param({"messages": [ASK, {"role": "assistant", "content": ""}]}, "chat", "content is empty", id="blank"),
        pytest.param({"messages": [ASK, {"role": "assistant"}]}, "chat", "[1].content is missing", id="no-text"),
        pytest.param({"conversations": [{"from": "human", "value": 1}]}, "chat", "[0].value is a number", id="value"),
        pytest.param({"messages": [ANSWER]}, "chat", "messages[0] is from the assistant; a conver", id="first"),
        pytest.param({"messages": [ASK, ANSWER, ASK]}, "chat", "messages[2], the last, is from the user", id="last"),
        pytest.param(
            {"messages": [ASK, {"role": "system", "content": "x"}, ANSWER]},
            "chat",
            "[1] is from the system",
            id="system",
        ),
        pytest.param({"messages": [{"role": "system", "content": "x"}]}, "chat", "messages[1] is missing", id="alone"),
        pytest.param({"messages": [ASK, ANSWER], "tools": "x"}, "chat", "field 'tools' is not a list", id="tools"),
    ],
)
def test_parse_row_of_unusable_row_raises_with_reason(fields, row_format, message):
    with pytest.raises(RowError) as caught:
        parse_row(fields, row_format)
    assert message in str(caught.value)


TEMPLATE = RowTemplate(prompt="Q: {the question} {hint}\nA:", answer=" {reply}")


def test_custom_template_takes_any_fields():
    row = {"the question": "{reply}?", "hint": "", "reply": "yes"}
    assert parse_row(row, "instruction", TEMPLATE) == Example("Q: {reply}? \nA:", " yes")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"the question": "x", "hint": "y"},
            "uses the field 'reply', but the row has the question, hint",
        ),
        ({"the question": "x", "hint": None, "reply": " "}, "spec.dataset.template.answer renders an empty text"),
        ({"the question": 3, "hint": "", "reply": "x"}, "field 'the question' is a number (3), not text"),
    ],
)
def test_row_that_does_not_fill_the_template_is_refused_with_cause(fields, message):
    with pytest.raises(RowError) as caught:
        parse_row(fields, "instruction", TEMPLATE)
    assert message in str(caught.value)


def test_equal_rows_have_equal_digests_and_others_do_not():
    rows = [Example("a", "b"), Example("ab", ""), Text("ab"), Chat((ASK, ANSWER)), Chat((ASK, ANSWER), ({},))]
    assert len({row.digest for row in rows}) == len(rows)
    assert Chat((dict(ASK), dict(ANSWER))).digest == Chat((ASK, ANSWER)).digest
