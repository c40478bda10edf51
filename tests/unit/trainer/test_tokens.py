"""Tokens: what is learned, what is masked, what is cut (traps 3 to 7)."""

import pytest

from qlora_trainer import shards
from qlora_trainer.rows import Example, render_instruction
from qlora_trainer.tokens import TokenRow, common_prefix_length, tokenise
from tests.unit.trainer.tiny import make_tokenizer

EXAMPLE = Example(render_instruction("What colour has the sky?"), "It is blue.")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def one_row(example: Example, tokenizer, loss: str = "completion") -> TokenRow:
    (row,) = tokenise([example], tokenizer, 256, loss).rows
    return row


def test_the_end_token_is_learned_although_it_is_the_padding_token_too(tokenizer):
    row = one_row(EXAMPLE, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert row.learned[-1][1] == len(row.input_ids)


def test_learned_tokens_are_the_answer_and_the_end(tokenizer):
    row = one_row(EXAMPLE, tokenizer)
    ((start, end),) = row.learned
    assert tokenizer.decode(row.input_ids[start:end]) == "It is blue.</s>"
    assert tokenizer.decode(row.input_ids[:start]) == EXAMPLE.prompt


def test_loss_on_all_tokens_leaves_out_only_the_first(tokenizer):
    row = one_row(EXAMPLE, tokenizer, loss="all")
    assert row.label_count == len(row.input_ids) - 1


@pytest.mark.parametrize("prompt", ["plain", "<s>it brings its own"])
def test_one_start_token(prompt):
    tokenizer = make_tokenizer(bos=True)
    row = one_row(Example(prompt, " answer"), tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert row.prompt_ids == row.input_ids[: row.learned[0][0]]


class SeamTokenizer:
    """Joins 'a' at the end of a prompt with 'b' at the start of an answer into one token."""

    bos_token_id, eos_token_id = None, 9

    def __call__(self, texts, add_special_tokens):  # noqa: ARG002 (the real signature)
        return {"input_ids": [[3 if part == "#" else ord(part) for part in text.replace("ab", "#")] for text in texts]}


def test_a_token_across_the_seam_belongs_to_the_answer():
    row = one_row(Example("xa", "bc"), SeamTokenizer())
    assert row.input_ids == (ord("x"), 3, ord("c"), 9)
    assert row.learned == ((1, 4),)


def test_long_rows_are_cut_and_counted_and_rows_without_an_answer_left_dropped(tokenizer):
    long_prompt = Example("word " * 200, "answer")
    long_answer = Example("word", " answer" * 200)
    done = tokenise([EXAMPLE, long_prompt, long_answer], tokenizer, 64, "completion")
    assert (len(done.rows), done.truncated, done.dropped) == (2, 2, 1)
    assert max(len(row.input_ids) for row in done.rows) == 64
    assert done.rows[1].input_ids[-1] != tokenizer.eos_token_id
    assert all(row.label_count > 0 for row in done.rows)
    assert done.longest > 200


def test_with_loss_on_all_tokens_a_long_prompt_is_kept(tokenizer):
    assert tokenise([Example("word " * 200, "answer")], tokenizer, 64, "all").dropped == 0


@pytest.mark.parametrize(("one", "other", "shared"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 9], [1, 2], 1)])
def test_common_prefix_length(one, other, shared):
    assert common_prefix_length(one, other) == shared


def test_shards_give_back_what_they_got(tokenizer):
    rows = tokenise([EXAMPLE, Example("ünïcode 🦙", "ja")], tokenizer, 256, "completion").rows
    assert shards.from_parquet(shards.to_parquet(rows, with_text=True)) == rows
    bare = shards.from_parquet(shards.to_parquet(rows, with_text=False))
    assert [row.input_ids for row in bare] == [row.input_ids for row in rows]
    assert {(row.prompt, row.prompt_ids) for row in bare} == {("", ())}
