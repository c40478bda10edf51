"""Chat rows: labels are the assistant turns up to their stop tokens, with every kind of template (traps 3 to 6)."""

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
THINKING = (  # like Qwen3: an empty think block before the last answer only
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (  # the system message moves into the last user turn
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
    """Build a conversation; the first letter of a turn is its role: s, u or a."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return Chat(tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns))


LONG = chat("s:Be brief.", "u:What colour has the sky?", "a:It is blue.", "u:And grass?", "a:It is green, indeed.")


def encode(tokenizer, source: str, conversation: Chat, loss: str = "auto") -> TokenRow:
    (row,) = encode_chats([conversation], load_chat_template(tokenizer, source), loss)
    assert isinstance(row, TokenRow), row
    return row


def label_texts(tokenizer, row: TokenRow) -> list[str]:
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
def test_chat_labels_are_the_answers_with_their_stop_tokens(tokenizer, source, expected):
    row = encode(tokenizer, source, LONG)
    assert label_texts(tokenizer, row) == expected
    assert row.reference == "It is green, indeed."


@pytest.mark.parametrize("loss", ["auto", "assistant"])
def test_assistant_loss_labels_every_assistant_turn(tokenizer, loss):
    assert len(encode(tokenizer, CHATML, LONG, loss).label_spans) == 2


def test_completion_loss_labels_only_the_last_answer(tokenizer):
    assert label_texts(tokenizer, encode(tokenizer, CHATML, LONG, "completion")) == ["It is green, indeed.<|im_end|>"]


def test_completion_loss_without_stop_token_labels_answer_and_end_token(tokenizer):
    assert label_texts(tokenizer, encode(tokenizer, BARE, LONG, "completion")) == [" It is green, indeed.\n</s>"]


def test_loss_on_all_tokens_of_a_chat_skips_only_the_first(tokenizer):
    row = encode(tokenizer, CHATML, LONG, "all")
    assert row.label_spans == ((1, len(row.input_ids)),)


@pytest.mark.parametrize("source", [LLAMA3, MISTRAL])
def test_rendered_chat_has_one_bos_token(tokenizer, source):
    row = encode(tokenizer, source, LONG)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == row.prompt_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("source", [CHATML, LLAMA3, THINKING, MISTRAL, TAGGED, BARE])
def test_chat_prompt_is_the_prefix_of_the_last_answer(tokenizer, source):
    row = encode(tokenizer, source, LONG)
    assert row.input_ids[: len(row.prompt_ids) - 1] == row.prompt_ids[:-1]
    assert row.label_spans[-1][0] in {len(row.prompt_ids), len(row.prompt_ids) - 1}, "a token may span the boundary"


def test_chat_tokens_equal_apply_chat_template(tokenizer):
    row = encode(tokenizer, LLAMA3, LONG)
    theirs = tokenizer.apply_chat_template(list(LONG.messages), chat_template=LLAMA3, return_dict=True)
    assert list(row.input_ids) == theirs["input_ids"]


def test_generation_tags_equal_assistant_mask_plus_stop_token(tokenizer):
    row = encode(tokenizer, TAGGED, LONG)
    theirs = tokenizer.apply_chat_template(
        list(LONG.messages), chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    ours = {position for start, end in row.label_spans for position in range(start, end)}
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert {position for position in ours if row.input_ids[position] != stop} == {
        position for position, mask in enumerate(theirs) if mask
    }


def test_identical_answers_are_distinguished_by_position(tokenizer):
    twice = chat("u:It is blue.", "a:It is blue.", "u:It is blue.", "a:It is blue.")
    row = encode(tokenizer, LLAMA3, twice)
    assert label_texts(tokenizer, row) == ["It is blue.<|eot|>"] * 2
    assert row.label_spans[0][1] < row.label_spans[1][0]


def test_tool_call_is_labeled_as_rendered(tokenizer):
    source = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}[{{ c.name }}]{% endfor %}")
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    answer = {"role": "assistant", "content": "Blue."}
    conversation = Chat(({"role": "user", "content": "Sky?"}, call, {"role": "tool", "content": "blue"}, answer))
    row = encode(tokenizer, source, conversation)
    assert label_texts(tokenizer, row) == ["[look]<|im_end|>", "Blue.<|im_end|>"]


def test_chat_rejected_by_template_is_error_and_others_are_encoded(tokenizer):
    template = load_chat_template(tokenizer, STRICT)
    good, bad = encode_chats([chat("u:Hi", "a:Ho"), LONG], template, "auto")
    assert isinstance(good, TokenRow)
    assert isinstance(bad, RowError)
    assert "the chat template rejects it: System role not supported" in str(bad)


def test_answer_rewritten_by_template_is_labeled_as_rendered(tokenizer):
    shouting = CHATML.replace("{{ m.content }}", "{{ m.content | upper if not loop.last else m.content }}")
    row = encode(tokenizer, shouting, LONG)
    assert label_texts(tokenizer, row) == ["IT IS BLUE.<|im_end|>", "It is green, indeed.<|im_end|>"]


def test_template_that_drops_questions_is_refused_with_the_field(tokenizer):
    dropping = CHATML.replace("{{ m.content }}", "{{ '…' if not loop.last else m.content }}")
    (row,) = encode_chats([LONG], load_chat_template(tokenizer, dropping), "auto")
    assert isinstance(row, RowError)
    assert str(row).startswith("messages[0].content is dropped by the model's chat template; set spec.")


def test_template_that_drops_earlier_answers_learns_each_in_its_own_row(tokenizer):
    dropping = CHATML.replace("{{ m.content }}", "{{ '…' if m.role == 'assistant' and not loop.last else m.content }}")
    row = encode(tokenizer, dropping, LONG)
    assert [label_texts(tokenizer, part) for part in (*row.earlier, row)] == [
        ["It is blue.<|im_end|>"],
        ["It is green, indeed.<|im_end|>"],
    ]


@pytest.mark.parametrize("source", [CHATML, LLAMA3, THINKING, MISTRAL, TAGGED, BARE])
def test_training_row_has_the_same_tokens_and_no_prompt(tokenizer, source):
    template = load_chat_template(tokenizer, source)
    training, validation = encode_chats([LONG, LONG], template, "auto", [False, True])
    assert isinstance(validation, TokenRow)
    assert training == TokenRow(validation.input_ids, validation.label_spans)
    assert validation == encode(tokenizer, source, LONG)
    assert validation.prompt_ids


def test_training_row_with_generation_tags_is_rendered_without_prompt(tokenizer):
    """This template fails when it renders a prompt, so only the validation row fails."""
    no_prompt = "{% if add_generation_prompt %}{{ raise_exception('prompt') }}{% endif %}" + TAGGED
    template = load_chat_template(tokenizer, no_prompt)
    training, validation = encode_chats([LONG, LONG], template, "auto", [False, True])
    assert isinstance(training, TokenRow)
    assert isinstance(validation, RowError)


def test_model_without_chat_template_is_refused(tokenizer):
    with pytest.raises(RunError, match=r"set spec\.dataset\.chatTemplate") as caught:
        load_chat_template(tokenizer, None)
    assert caught.value.reason == Reason.MODEL_UNSUPPORTED


def test_given_chat_template_overrides_the_models_own(tokenizer):
    tokenizer.chat_template = CHATML
    try:
        assert load_chat_template(tokenizer, None).stop_token == "<|im_end|>"
        assert load_chat_template(tokenizer, LLAMA3).stop_token == "<|eot|>"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}\n{{ m.content }}", "line 2: Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ raise_exception('never') }}", "never"),
        (
            CHATML.partition("{% if add")[0] + "<|im_start|>assistant\n",
            "ends every conversation with the generation pro",
        ),
        (BARE.partition("{% if add")[0] + "assistant: ", "ends every conversation with the generation prompt"),
    ],
)
def test_chat_template_that_cannot_render_is_refused(tokenizer, source, message):
    with pytest.raises(RunError, match=r"^spec\.dataset\.chatTemplate: ") as caught:
        load_chat_template(tokenizer, source)
    assert (caught.value.reason, message in caught.value.message) == (Reason.INVALID_SPEC, True), caught.value.message
