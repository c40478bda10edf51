"""Conversations: each assistant turn learned up to its stop token, whatever the template (traps 3 to 6)."""

import pytest

from qlora_api.reasons import Reason
from qlora_trainer.data.chat_template import encode_chats, load_chat_template
from qlora_trainer.data.rows import Chat, RowError
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.errors import RunError
from tests.unit.trainer.tiny import make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
THINKING = (  # as Qwen3's: an empty thought before the last answer only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (  # the system's words move to the last user's turn
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 >= messages | length - 2 and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "A: {% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer(bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def chat(*turns: str) -> Chat:
    """Roles are told by their first letter: s, u, a."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Chat(tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns))


LONG = chat("s:Be brief.", "u:What colour has the sky?", "a:It is blue.", "u:And grass?", "a:It is green, indeed.")


def encode(tokenizer, source: str, conversation: Chat, loss: str = "auto") -> TokenRow:
    (row,) = encode_chats([conversation], load_chat_template(tokenizer, source), loss)
    assert isinstance(row, TokenRow), row
    return row


def learned(tokenizer, row: TokenRow) -> list[str]:
    return [tokenizer.decode(row.input_ids[start:end]) for start, end in row.label_spans]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(CHATML, ["It is blue.<|im_end|>", "It is green, indeed.<|im_end|>"], id="chatml"),
        pytest.param(LLAMA3, ["It is blue.<|eot|>", "It is green, indeed.<|eot|>"], id="llama-3"),
        pytest.param(
            THINKING, ["It is blue.<|im_end|>", "<think>\n\n</think>\n\nIt is green, indeed.<|im_end|>"], id="qwen-3"
        ),
        pytest.param(MISTRAL, [" It is blue.</s>", " It is green, indeed.</s>"], id="mistral"),
        pytest.param(TAGGED, [" It is blue.<|im_end|>", " It is green, indeed.<|im_end|>"], id="generation-tags"),
        pytest.param(BARE, [" It is blue.\n", " It is green, indeed.\n</s>"], id="no-stop-token"),
    ],
)
def test_every_answer_is_learned_with_its_end_and_nothing_else(tokenizer, source, expected):
    row = encode(tokenizer, source, LONG)
    assert learned(tokenizer, row) == expected
    assert row.reference == "It is green, indeed."


@pytest.mark.parametrize("loss", ["auto", "assistant"])
def test_every_turn_of_the_assistant_is_learned(tokenizer, loss):
    assert len(encode(tokenizer, CHATML, LONG, loss).label_spans) == 2


def test_completion_is_the_last_answer(tokenizer):
    assert learned(tokenizer, encode(tokenizer, CHATML, LONG, "completion")) == ["It is green, indeed.<|im_end|>"]


def test_completion_of_a_template_without_a_stop_token_is_more_than_the_end(tokenizer):
    assert learned(tokenizer, encode(tokenizer, BARE, LONG, "completion")) == [" It is green, indeed.\n</s>"]


def test_all_is_everything_but_the_first_token(tokenizer):
    row = encode(tokenizer, CHATML, LONG, "all")
    assert row.label_spans == ((1, len(row.input_ids)),)


@pytest.mark.parametrize("source", [LLAMA3, MISTRAL])
def test_rendered_chat_has_one_bos_token(tokenizer, source):
    row = encode(tokenizer, source, LONG)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == row.prompt_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("source", [CHATML, LLAMA3, THINKING, MISTRAL, TAGGED, BARE])
def test_the_prompt_is_what_the_last_answer_continues(tokenizer, source):
    row = encode(tokenizer, source, LONG)
    assert row.input_ids[: len(row.prompt_ids) - 1] == row.prompt_ids[:-1]
    assert row.label_spans[-1][0] in {len(row.prompt_ids), len(row.prompt_ids) - 1}, "a token may span the seam"


def test_tokens_are_those_of_transformers_itself(tokenizer):
    row = encode(tokenizer, LLAMA3, LONG)
    theirs = tokenizer.apply_chat_template(list(LONG.messages), chat_template=LLAMA3, return_dict=True)
    assert list(row.input_ids) == theirs["input_ids"]


def test_generation_tags_agree_with_transformers_mask_but_for_the_stop_token(tokenizer):
    row = encode(tokenizer, TAGGED, LONG)
    theirs = tokenizer.apply_chat_template(
        list(LONG.messages), chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    ours = {place for start, end in row.label_spans for place in range(start, end)}
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {place for place in ours if row.input_ids[place] != stop} == {
        place for place, mask in enumerate(theirs) if mask
    }


def test_identical_answers_are_distinguished_by_position(tokenizer):
    twice = chat("u:It is blue.", "a:It is blue.", "u:It is blue.", "a:It is blue.")
    row = encode(tokenizer, LLAMA3, twice)
    assert learned(tokenizer, row) == ["It is blue.<|eot|>"] * 2
    assert row.label_spans[0][1] < row.label_spans[1][0]


def test_a_tool_call_is_learned_as_the_template_writes_it(tokenizer):
    source = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}[{{ c.name }}]{% endfor %}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    answer = {"role": "assistant", "content": "Blue."}
    conversation = Chat(({"role": "user", "content": "Sky?"}, call, {"role": "tool", "content": "blue"}, answer))
    row = encode(tokenizer, source, conversation)
    assert learned(tokenizer, row) == ["[look]<|im_end|>", "Blue.<|im_end|>"]


def test_a_row_that_the_template_refuses_is_an_error_and_the_others_are_rows(tokenizer):
    template = load_chat_template(tokenizer, STRICT)
    good, bad = encode_chats([chat("u:Hi", "a:Ho"), LONG], template, "auto")
    assert isinstance(good, TokenRow)
    assert isinstance(bad, RowError)
    assert "the chat template refuses it: System role not supported" in str(bad)


def test_an_answer_that_the_template_rewrites_is_learned_as_it_is_written(tokenizer):
    shouting = CHATML.replace("{{ m.content }}", "{{ m.content | upper if not loop.last else m.content }}")
    row = encode(tokenizer, shouting, LONG)
    assert learned(tokenizer, row) == ["IT IS BLUE.<|im_end|>", "It is green, indeed.<|im_end|>"]


def test_template_that_drops_earlier_answers_needs_generation_tags(tokenizer):
    forgetful = CHATML.replace("{{ m.content }}", "{{ '…' if not loop.last else m.content }}")
    (row,) = encode_chats([LONG], load_chat_template(tokenizer, forgetful), "auto")
    assert isinstance(row, RowError)
    assert "put {% generation %} around the answer" in str(row)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, THINKING, MISTRAL, TAGGED, BARE])
def test_a_row_that_is_learned_from_has_the_same_tokens_and_no_prompt(tokenizer, source):
    template = load_chat_template(tokenizer, source)
    learned_from, asked = encode_chats([LONG, LONG], template, "auto", [False, True])
    assert isinstance(asked, TokenRow)
    assert learned_from == TokenRow(asked.input_ids, asked.label_spans)
    assert asked == encode(tokenizer, source, LONG)
    assert asked.prompt_ids


def test_tagged_rows_that_are_learned_from_are_rendered_once(tokenizer):
    """The template that asks is the one that refuses: nobody asks a row that is learned from."""
    once = "{% if add_generation_prompt %}{{ raise_exception('asked') }}{% endif %}" + TAGGED
    template = load_chat_template(tokenizer, once)
    learned_from, asked = encode_chats([LONG, LONG], template, "auto", [False, True])
    assert isinstance(learned_from, TokenRow)
    assert isinstance(asked, RowError)


def test_a_model_without_a_template_needs_one(tokenizer):
    with pytest.raises(RunError, match=r"give spec\.dataset\.chatTemplate") as caught:
        load_chat_template(tokenizer, None)
    assert caught.value.reason == Reason.MODEL_UNSUPPORTED


def test_the_models_own_template_is_used_where_none_is_given(tokenizer):
    tokenizer.chat_template = CHATML
    try:
        assert load_chat_template(tokenizer, None).stop_token == "<|im_end|>"
        assert load_chat_template(tokenizer, LLAMA3).stop_token == "<|eot|>"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}\n{{ m.content }}", "line 2: Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_given_template_that_renders_nothing_is_refused(tokenizer, source, words):
    with pytest.raises(RunError, match=r"^spec\.dataset\.chatTemplate: ") as caught:
        load_chat_template(tokenizer, source)
    assert (caught.value.reason, words in caught.value.message) == (Reason.INVALID_SPEC, True), caught.value.message
