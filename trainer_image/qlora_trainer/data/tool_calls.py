"""Tools and tool calls of a chat row, in the form that chat templates expect: objects, not JSON in text."""

from collections.abc import Mapping
from typing import Any

from qlora_trainer.data.json_values import check_unicode, parse_json_text, without_nulls
from qlora_trainer.data.rows import RowError, kind_of


def parse_tools(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return the tools of a row, also those of OpenAI's older field `functions`, or raise RowError."""
    tools = _parse_list(fields.get("tools"), "field 'tools'")
    functions = _parse_list(fields.get("functions"), "field 'functions'")
    return (*tools, *({"type": "function", "function": function} for function in functions))


def _parse_list(value: Any, label: str) -> list[dict[str, Any]]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    decoded = parse_json_text(value, label) if _is_json(value) else without_nulls(value)
    if not isinstance(decoded, list):
        raise RowError(f"{label} is not a list of objects; write JSON schemas, or remove it")
    tools = [parse_json_text(tool, label) if _is_json(tool) else tool for tool in decoded]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{label} is not a list of objects; write JSON schemas, or remove it")
    check_unicode(tools, label)
    return tools


def parse_calls(value: Any, label: str) -> list[Any]:
    """Return the calls of a message, their arguments decoded as an OpenAI server does before it renders."""
    if isinstance(value, str):
        value = parse_json_text(value, label) if value.strip() else None
    if value is None:
        return []
    calls = without_nulls([value] if isinstance(value, dict) else value)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{label} is {kind_of(value)}, not a list of objects; write [{{…}}], or remove it")
    decoded = [_decode_call(call, f"{label}[{index}]") for index, call in enumerate(calls) if call]
    check_unicode(decoded, label)
    return decoded


def parse_function_call(turn: Mapping[str, Any], where: str) -> list[Any]:
    """Return the call in OpenAI's older field `function_call`, in the form of `tool_calls`."""
    calls = parse_calls(turn.get("function_call"), f"{where}.function_call")
    return [{"type": "function", "function": call} for call in calls]


def _decode_call(call: dict[str, Any], label: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _decode_call(call["function"], f"{label}.function")}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    decoded = parse_json_text(arguments, f"{label}.arguments") if arguments.strip() else {}
    if decoded is None:
        decoded = {}
    if not isinstance(decoded, dict):
        raise RowError(f"{label}.arguments is {kind_of(decoded)}, not an object; write the arguments by their names")
    return {**call, "arguments": decoded}


def _is_json(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(("[", "{"))
