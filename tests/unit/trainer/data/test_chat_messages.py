"""Chat rows as people have them: JSON in text, nulls of columnar files, parts, calls, flags, and other forms."""

import json

import pytest

from qlora_trainer.data.row_formats import detect_format, instruction_prompt, parse_row
from qlora_trainer.data.rows import Chat, Example, RowError

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SCHEMA = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def text_call(arguments: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"messages": json.dumps([ASK, ANSWER])}, Chat((ASK, ANSWER)), id="messages-as-text"),
        pytest.param({"messages": [ASK, ANSWER], "tools": json.dumps([TOOL])}, Chat((ASK, ANSWER), (TOOL,)), id="all"),
        pytest.param({"messages": [ASK, ANSWER], "tools": [json.dumps(TOOL)]}, Chat((ASK, ANSWER), (TOOL,)), id="tool"),
        pytest.param({"messages": [ASK, ANSWER], "tools": "[]"}, Chat((ASK, ANSWER)), id="no-tools-as-text"),
        pytest.param({"messages": [ASK, ANSWER], "tools": ""}, Chat((ASK, ANSWER)), id="tools-of-csv"),
        pytest.param({"messages": [ASK, ANSWER], "functions": [SCHEMA]}, Chat((ASK, ANSWER), (TOOL,)), id="functions"),
        pytest.param(
            {"messages": [ASK, {**CALLING, "tool_calls": [text_call('{"city": "Rome"}')]}]},
            Chat((ASK, CALLING)), id="arguments-as-text",
        ),
        pytest.param(
            {"messages": [ASK, {**CALLING, "tool_calls": json.dumps([CALL])}]}, Chat((ASK, CALLING)), id="calls-json",
        ),
        pytest.param(
            {"messages": [ASK, {"role": "assistant", "content": None,
                                "function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]},
            Chat((ASK, CALLING)), id="function-call",
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "Hi"},
                               {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
                               {"from": "observation", "value": "7"}, {"from": "gpt", "value": "Hello"}]},
            Chat((ASK, {"role": "assistant", "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]},
                  {"role": "tool", "content": "7"}, ANSWER)), id="call-of-sharegpt",
        ),
        pytest.param(
            {"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]}, Chat((ASK, CALLING)), id="no-content-key",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "image_url": None}]},
                          {"role": "assistant", "content": ["Hel", {"text": "lo"}]}]},
            Chat((ASK, {"role": "assistant", "content": "Hel\nlo"})), id="parts",
        ),
        pytest.param(
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be."},
            Chat(({"role": "system", "content": "Be."}, ASK, ANSWER)), id="system-field",
        ),
        pytest.param({"messages": [ASK, ANSWER], "system": " "}, Chat((ASK, ANSWER)), id="blank-system-field"),
        pytest.param(
            {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {**ANSWER, "weight": 1}], "system": "Be."},
            Chat(({"role": "system", "content": "Be."}, ASK, ANSWER, ASK, ANSWER), masked=(2,)), id="weight",
        ),
        pytest.param(
            {"messages": [{**ASK, "train": False}, {**ANSWER, "train": True}]}, Chat((ASK, ANSWER)), id="train",
        ),
        pytest.param({"prompt": [ASK], "completion": [ANSWER]}, Chat((ASK, ANSWER)), id="prompt-and-completion"),
        pytest.param({"prompt": [ASK], "completion": "Hello"}, Chat((ASK, ANSWER)), id="completion-as-text"),
        pytest.param(
            {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]},
            Chat((ASK, ANSWER, ASK, ANSWER), masked=(1,)), id="answer-in-the-prompt",
        ),
        pytest.param(
            {"messages": [{"role": "system", "content": ""}, ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]},
            Chat((ASK, ANSWER, ASK, ANSWER), masked=(1,)), id="empty-system",
        ),
        pytest.param({"messages": [{"role": "system", "content": None}, ASK, ANSWER]}, Chat((ASK, ANSWER)), id="null"),
        pytest.param(
            {"conversations": [{"from": "system", "value": " "}, {"from": "human", "value": "Hi"},
                               {"from": "gpt", "value": "Hello"}], "system": "Be."},
            Chat(({"role": "system", "content": "Be."}, ASK, ANSWER)), id="empty-system-of-sharegpt",
        ),
        pytest.param(
            {"messages": [ASK, CALLING, {"role": "tool", "content": ""}, ANSWER]},
            Chat((ASK, CALLING, {"role": "tool", "content": ""}, ANSWER)), id="empty-result-of-a-tool",
        ),
        pytest.param(
            {"messages": [{**ASK, "name": ""}, {**ANSWER, "thinking": "", "reasoning_content": " \n"}]},
            Chat((ASK, ANSWER)), id="blank-fields",
        ),
    ],
)  # fmt: skip
def test_row_is_read_as_its_author_meant_it(fields, expected):
    assert parse_row(fields, "chat") == expected


def test_nulls_that_arrow_adds_are_no_arguments_and_no_schema():
    arguments = {"city": "Rome", "ticker": None, "day": {"month": 7, "year": None}}
    call = {"type": "function", "id": None, "function": {"name": "get_weather", "arguments": arguments}}
    tool = {"type": "function", "function": {**SCHEMA, "parameters": {"type": "object", "required": None}}}
    chat = parse_row({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [tool]},
                     "chat")  # fmt: skip
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "day": {"month": 7}}
    assert chat.tools == ({"type": "function", "function": {**SCHEMA, "parameters": {"type": "object"}}},)


def test_null_in_arguments_that_are_text_is_kept():
    chat = parse_row({"messages": [ASK, {**CALLING, "tool_calls": [text_call('{"city": null}')]}]}, "chat")
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"messages": "[{'role': 'user'}]"}, "field 'messages' is text, but not JSON", id="python-text"),
        pytest.param({"messages": [ASK, ANSWER], "tools": "[oops"}, "field 'tools' is text, but not JSON", id="tools"),
        pytest.param({"messages": [ASK, ANSWER], "tools": "[" * 9000}, "nested in more than", id="deep-tools"),
        pytest.param({"messages": [ASK, ANSWER], "tools": "[" + "7" * 5000 + "]"}, "'tools' is text, but", id="digits"),
        pytest.param(
            {"messages": [ASK, {**CALLING, "tool_calls": [text_call("{oops")]}]},
            "messages[1].tool_calls[0].function.arguments is text, but not JSON", id="arguments",
        ),
        pytest.param(
            {"messages": [ASK, {**CALLING, "tool_calls": [text_call("7")]}]}, "arguments is a number, not", id="seven",
        ),
        pytest.param({"messages": [ASK, {**CALLING, "tool_calls": 7}]}, "tool_calls is a number, not a", id="calls"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER]},
            "messages[0].content[0] has the type 'image_url', and only text is trained on", id="image-part",
        ),
        pytest.param({"messages": [{"role": "user", "content": [7]}, ANSWER]}, "content[0] is a number", id="part"),
        pytest.param({"messages": [ASK, ANSWER], "images": ["x.png"]}, "field 'images' has media", id="images"),
        pytest.param({"messages": [ASK, {**ANSWER, "weight": 0}]}, "every answer in 'messages' has the we", id="all-0"),
        pytest.param({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "messages[1].weight is 0.5; write 0", id="half"),
        pytest.param({"messages": [ASK, {**ANSWER, "train": "no"}]}, "messages[1].train is 'no'; write 0", id="no"),
        pytest.param({"messages": [{**ASK, "train": True}, ANSWER]}, "only answers of the assistant are", id="user"),
        pytest.param(
            {"messages": [{"role": "system", "content": "Be."}, ASK, ANSWER], "system": "Be not."},
            "has a system message in field 'system' and another in messages[0]; keep one", id="two-systems",
        ),
        pytest.param({"messages": [{"role": "user", "content": " "}, ANSWER]}, "[0].content is empty", id="empty-user"),
        pytest.param({"messages": [ASK, {"role": "assistant", "content": ""}]}, "[1].content is empty", id="empty"),
        pytest.param({"messages": [ASK, CALLING, {"role": "tool"}, ANSWER]}, "[2].content is missing", id="no-result"),
        pytest.param({"prompt": [ASK]}, "field 'completion' is missing", id="no-completion"),
        pytest.param({"prompt": [ASK], "completion": []}, "field 'completion' is empty", id="empty-completion"),
        pytest.param(
            {"messages": [ASK, ANSWER], "tools": [{"name": "w", "description": "cut \ud83d"}]},
            "field 'tools'[0].description contains bytes that are not UTF-8, or half a character", id="half-in-tools",
        ),
        pytest.param(
            {"messages": [ASK, {**CALLING, "tool_calls": [text_call('{"a": "\\ud83d"}')]}]},
            "tool_calls[0].function.arguments.a contains", id="half-in-arguments",
        ),
        pytest.param(
            {"messages": [ASK, {**ANSWER, "reasoning_content": "\ud83d"}]},
            "messages[1].reasoning_content contains", id="half-in-thoughts",
        ),
    ],
)  # fmt: skip
def test_row_that_cannot_be_read_is_refused_with_the_field(fields, message):
    with pytest.raises(RowError) as caught:
        parse_row(fields, "chat")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"prompt": [ASK], "completion": [ANSWER]}, ("chat", "prompt"), id="prompt-of-messages"),
        pytest.param({"messages": None, "instruction": "x", "output": "y"}, ("instruction",) * 2, id="null-column"),
        pytest.param({"messages": "", "instruction": "x", "output": "y"}, ("instruction",) * 2, id="empty-cell"),
        pytest.param({"text": None}, ("text", "text"), id="only-null"),
    ],
)
def test_format_is_detected_by_fields_that_have_content(fields, expected):
    assert detect_format(fields) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "Add", "input": "1 2", "context": None, "output": "3", "response": None},
        {"instruction": "Add", "input": None, "context": "1 2", "output": None, "response": "3"},
        {"instruction": "Add", "input": "1 2", "context": "", "output": "3", "response": ""},
    ],
)
def test_null_and_empty_columns_of_another_form_are_not_there(fields):
    expected = Example("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n", "3")
    assert parse_row(fields, "instruction") == expected


@pytest.mark.parametrize("history", [[["Hi", "Ho"]], '[["Hi", "Ho"]]'])
def test_history_and_system_of_alpaca_are_in_the_prompt(history):
    prompt = "Be.\n\n### Instruction:\nHi\n\n### Response:\nHo\n\n### Instruction:\nAdd\n\n### Response:\n"
    assert instruction_prompt({"instruction": "Add", "history": history, "system": "Be."}) == prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"history": [["Hi"]]}, "field 'history' is not a list of [question, answer]"),
        ({"history": [["Hi", ""]]}, "history[0].answer is empty"),
        ({"history": 7}, "field 'history' is not a list"),
        ({"system": 7}, "field 'system' is a number"),
    ],
)
def test_history_that_cannot_be_read_is_refused(fields, message):
    with pytest.raises(RowError) as caught:
        parse_row({"instruction": "Add", "output": "3", **fields}, "instruction")
    assert message in str(caught.value)


def test_unwanted_completion_is_refused():
    with pytest.raises(RowError, match="field 'label' is false, so its completion is an unwanted one"):
        parse_row({"prompt": "x", "completion": "y", "label": False}, "completion")
