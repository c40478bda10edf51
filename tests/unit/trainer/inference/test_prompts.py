"""A question is rendered exactly like the prompts of the training rows, in every format."""

import json

import pytest

from qlora_api.v1alpha1 import RowTemplate
from qlora_trainer.data.chat_template import encode_chats, load_chat_template
from qlora_trainer.data.row_formats import parse_row
from qlora_trainer.data.tokenization import encode_examples
from qlora_trainer.errors import RunError
from qlora_trainer.inference.prompts import make_prompt_builder
from tests.unit.trainer.data.test_chat_template import LLAMA3, MISTRAL, SPECIAL, chat
from tests.unit.trainer.tiny import make_tokenizer
from tests.unit.trainer.trained import make_record
from tests.unit.trainer.tuned import NF4

TEMPLATE = RowTemplate(prompt="Q: {question}\nA:", answer=" {answer}")
PAIR = RowTemplate(prompt="{context}\n\nQ: {question}\nA:", answer=" {answer}")


@pytest.fixture(scope="module", params=[False, True], ids=["no-start-token", "start-token"])
def tokenizer(request):
    tokenizer = make_tokenizer(bos=request.param)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def prompt_builder(tokenizer, row_format: str, template: RowTemplate | None = None):
    record = make_record(NF4).model_copy(update={"format": row_format, "template": template})
    return make_prompt_builder(record, tokenizer)


def user(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.mark.parametrize(
    ("row_format", "template", "question", "fields"),
    [
        ("instruction", None, "Why?", {"instruction": "Why?", "output": "So."}),
        ("instruction", None, '{"instruction": "Why?", "input": "It rains."}', {"output": "So."}),
        ("instruction", None, '{"why": "no row"}', {"instruction": '{"why": "no row"}', "output": "."}),
        ("instruction", TEMPLATE, "Why?", {"question": "Why?", "answer": "So."}),
        ("instruction", TEMPLATE, '{"question": "Why?"}', {"answer": "So."}),
        ("instruction", PAIR, '{"question": "Why?", "context": "Rain."}', {"answer": "So."}),
        ("completion", None, "Why? ", {"prompt": "Why? ", "completion": "So."}),
        ("completion+text", None, "Why? ", {"prompt": "Why? ", "completion": "So."}),
    ],
)  # fmt: skip
def test_question_has_the_tokens_of_a_training_prompt(tokenizer, row_format, template, question, fields):
    if question.startswith("{") and "why" not in question:
        fields = json.loads(question) | fields
    example = parse_row(fields, row_format.split("+")[0], template)
    (row,) = encode_examples([example], tokenizer, "completion")
    assert prompt_builder(tokenizer, row_format, template).build(user(question)) == list(row.prompt_ids)
    assert row.input_ids[: row.label_spans[0][0]] == row.prompt_ids[: row.label_spans[0][0]]


@pytest.mark.parametrize("source", [LLAMA3, MISTRAL])
@pytest.mark.parametrize("row_format", ["chat", "chat+instruction"])
def test_conversation_has_the_tokens_of_a_training_prompt(tokenizer, source, row_format):
    tokenizer.chat_template = source
    builder = prompt_builder(tokenizer, row_format)
    turns = chat("s:Be brief.", "u:Hello", "a:Hi.", "u:And you?", "a:Fine.")
    (row,) = encode_chats([turns], load_chat_template(tokenizer, None), "completion")
    assert builder.build(turns.messages[:-1]) == list(row.prompt_ids)
    assert builder.chat is not None


def test_history_is_ignored_without_chat_template(tokenizer):
    assert prompt_builder(tokenizer, "instruction").chat is None
    earlier = [*user("First?"), {"role": "assistant", "content": "One."}]
    builder = prompt_builder(tokenizer, "instruction")
    assert builder.build([*earlier, *user("Second?")]) == builder.build(user("Second?"))


@pytest.mark.parametrize(
    ("template", "question", "message"),
    [
        (
            PAIR,
            "Why?",
            'the question: the prompts of this adapter have the fields context, question; ask with {"context": "…", '
            '"question": "…"}',
        ),
        (None, '{"instruction": 7}', "the question: field 'instruction' is a number (7), not text; write a string"),
    ],
)
def test_question_without_the_fields_is_rejected_with_an_example(tokenizer, template, question, message):
    with pytest.raises(RunError) as caught:
        prompt_builder(tokenizer, "instruction", template).build(user(question))
    assert caught.value.message == message
