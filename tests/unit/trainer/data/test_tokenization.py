"""Tokenization, label spans and shards (traps 3 to 7)."""

import pytest

from qlora_trainer.data import shards
from qlora_trainer.data.row_formats import render_instruction
from qlora_trainer.data.rows import Example, Text
from qlora_trainer.data.tokenization import TokenRow, common_prefix_length, encode_examples, encode_texts
from tests.unit.trainer.tiny import make_tokenizer

EXAMPLE = Example(render_instruction("What colour has the sky?"), "It is blue.")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def one_row(example: Example, tokenizer, loss: str = "auto") -> TokenRow:
    (row,) = encode_examples([example], tokenizer, loss)
    return row


def test_end_token_is_a_label_although_it_is_also_the_padding_token(tokenizer):
    row = one_row(EXAMPLE, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert row.input_ids[-1] == tokenizer.eos_token_id
    assert row.label_spans[-1][1] == len(row.input_ids)


@pytest.mark.parametrize("loss", ["auto", "completion", "assistant"])
def test_labels_are_answer_and_end_token(tokenizer, loss):
    row = one_row(EXAMPLE, tokenizer, loss)
    ((start, end),) = row.label_spans
    assert tokenizer.decode(row.input_ids[start:end]) == "It is blue.</s>"
    assert tokenizer.decode(row.input_ids[:start]) == EXAMPLE.prompt


def test_loss_on_all_tokens_skips_only_the_first(tokenizer):
    row = one_row(EXAMPLE, tokenizer, loss="all")
    assert row.label_count == len(row.input_ids) - 1


def test_text_row_is_all_labels_and_has_no_prompt(tokenizer):
    (row,) = encode_texts([Text("It is blue.")], tokenizer)
    assert tokenizer.decode(row.input_ids) == "It is blue.</s>"
    assert (row.label_spans, row.prompt_ids, row.reference) == (((1, len(row.input_ids)),), (), "")


@pytest.mark.parametrize("prompt", ["plain", "<s>it brings its own"])
def test_prompt_has_exactly_one_start_token(prompt):
    tokenizer = make_tokenizer(bos=True)
    row = one_row(Example(prompt, " answer"), tokenizer)
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert row.prompt_ids == row.input_ids[: row.label_spans[0][0]]


class SeamTokenizer:
    """Joins 'a' at the end of a prompt with 'b' at the start of an answer into one token."""

    bos_token_id, eos_token_id, eos_token = None, 9, "</s>"

    def __call__(self, texts, add_special_tokens):  # noqa: ARG002 (the real signature)
        return {"input_ids": [[3 if part == "#" else ord(part) for part in text.replace("ab", "#")] for text in texts]}


def test_token_across_prompt_and_answer_is_a_label():
    row = one_row(Example("xa", "bc"), SeamTokenizer())
    assert row.input_ids == (ord("x"), 3, ord("c"), 9)
    assert row.label_spans == ((1, 4),)


@pytest.mark.parametrize(
    ("length", "label_spans"),
    [(20, ((3, 5), (8, 10))), (9, ((3, 5), (8, 9))), (8, ((3, 5),)), (4, ((3, 4),)), (2, ())],
)
def test_truncate_keeps_labels_before_the_cut(length, label_spans):
    row = TokenRow(tuple(range(10)), ((3, 5), (8, 10))).truncate(length)
    assert (len(row.input_ids), row.label_spans) == (min(length, 10), label_spans)
    assert row.label_count == sum(end - start for start, end in label_spans)


@pytest.mark.parametrize(("one", "other", "shared"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 9], [1, 2], 1)])
def test_common_prefix_length(one, other, shared):
    assert common_prefix_length(one, other) == shared


def write(path, rows, *, with_text):
    with shards.ShardWriter(path, with_text=with_text) as file:
        for row in rows:
            file.add(row)
    return path


def test_shard_round_trips_rows(tokenizer, tmp_path):
    rows = encode_examples([EXAMPLE, Example("ünïcode 🦙", "ja")], tokenizer, "auto")
    path = write(tmp_path / "rows.parquet", rows, with_text=True)
    assert list(shards.open_shard(path)) == list(shards.read_token_rows(path)) == rows
    bare = shards.open_shard(write(tmp_path / "bare.parquet", rows, with_text=False))
    assert [row.input_ids for row in bare] == [row.input_ids for row in rows]
    assert {(row.prompt, row.prompt_ids) for row in bare} == {("", ())}


def test_shard_indexes_rows_across_row_groups(tmp_path):
    rows = [TokenRow((number, 1, 2), ((1, 3),)) for number in range(2 * shards.GROUP_ROWS + 5)]
    shard = shards.open_shard(write(tmp_path / "rows.parquet", rows, with_text=True))
    assert len(shard) == len(rows)
    for number in (0, shards.GROUP_ROWS - 1, shards.GROUP_ROWS, 2 * shards.GROUP_ROWS + 4, -1):
        assert shard[number] == rows[number]
    assert shard[998:1003] == tuple(rows[998:1003])
    with pytest.raises(IndexError):
        shard[len(rows)]
    wanted = [3, 1000, 2004]
    assert list(shards.read_token_rows(tmp_path / "rows.parquet", wanted)) == [rows[number] for number in wanted]


def test_empty_shard_has_no_rows(tmp_path):
    assert len(shards.open_shard(write(tmp_path / "rows.parquet", [], with_text=True))) == 0
