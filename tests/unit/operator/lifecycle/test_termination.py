"""Termination messages, whole and cut by the kubelet."""

import json

import pytest

from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.v1alpha1 import Checkpoint
from qlora_operator.lifecycle.termination import is_cut, parse_termination_message
from tests.make import NOW, PREPARED_MESSAGE, PUBLISHED_MESSAGE

CHECKPOINT = Checkpoint(step=40, uri="s3://a/b/checkpoints/step-000040-a1", time=NOW)
FAILED = TerminationMessage(
    reason=Reason.DATASET_INVALID, step=41, checkpoint=CHECKPOINT, message='row 17: "x" \n ü 🦙 ' * 100
).model_dump_json(by_alias=True, exclude_none=True)


@pytest.mark.parametrize("text", [FAILED, PREPARED_MESSAGE, PUBLISHED_MESSAGE, f"a log line\n{FAILED}"])
def test_cut_message_has_its_reason_wherever_it_was_cut(text: str) -> None:
    whole = parse_termination_message(text)
    assert whole is not None
    assert not is_cut(text)
    start = text.index("{") + len('{"reason":""') + len(whole.reason)
    for end in range(start, len(text)):
        message = parse_termination_message(text[:end])
        assert message is not None, end
        assert is_cut(text[:end])
        assert message.reason is whole.reason
        assert whole.message.startswith(message.message.rstrip("�")), end


def test_cut_message_has_what_comes_before_its_text() -> None:
    cut = parse_termination_message(FAILED[:1024])
    assert cut is not None
    assert (cut.step, cut.checkpoint) == (41, CHECKPOINT)
    assert len(cut.message) > 400


@pytest.mark.parametrize("escaped", [True, False])
def test_text_cut_within_a_character_is_kept(escaped: bool) -> None:
    text = json.dumps({"reason": "TrainerError", "message": "ab🦙"}, ensure_ascii=escaped)
    for end in range(text.index("ab") + 2, len(text) - 2):
        message = parse_termination_message(text[:end])
        assert message is not None
        assert message.message.startswith("ab"), end


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "Killed",
        '{"reason"',
        '{"reason":"Pub',
        '{"message":"x',
        '["reason"',
        "{" * 9999,
    ],
)
def test_text_without_a_reason_is_no_termination_message(text: str) -> None:
    assert parse_termination_message(text) is None
    assert not is_cut(text)


def test_message_of_an_earlier_trainer_that_was_cut_is_read() -> None:
    """It has its text before its facts."""
    text = json.dumps({"reason": "S3Denied", "message": "no", "step": 3, "checkpoint": {"step": 3, "uri": "s3"}})
    message = parse_termination_message(text[: text.index("uri")])
    assert message is not None
    assert (message.reason, message.message, message.step, message.checkpoint) == (Reason.S3_DENIED, "no", 3, None)


@pytest.mark.parametrize("depth", [500, 990, 993, 1500, 1950])
@pytest.mark.parametrize("closed", [True, False])
def test_deeply_nested_message_is_no_exception(depth: int, closed: bool) -> None:
    text = '{"reason": "TrainerError", "message": "x", "foo": ' + "[" * depth + ("]" * depth + "}" if closed else "")
    parse_termination_message(text)
    assert is_cut(text) in {True, False}
