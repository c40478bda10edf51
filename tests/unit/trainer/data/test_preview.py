"""Previews of rows in the log and in the report."""

from qlora_api.report import TextSpan
from qlora_trainer.data.preview import format_preview, preview, shown_rows
from qlora_trainer.data.rows import Example
from qlora_trainer.data.tokenization import TokenRow, encode_examples
from tests.unit.trainer.tiny import make_tokenizer


def test_preview_marks_labels_with_end_token():
    tokenizer = make_tokenizer(bos=True)
    (row,) = encode_examples([Example("Sky?\n", "Blue ⟦🦙⟧.")], tokenizer, "auto")
    assert format_preview(preview(row, tokenizer)) == "<s>Sky?\n⟦Blue ⟦🦙⟧.</s>⟧"


def test_preview_spans_cover_the_row():
    tokenizer = make_tokenizer()
    ids = tuple(tokenizer("one two three four")["input_ids"])
    for label_spans in [(), ((1, 2),), ((1, 3), (4, 5)), ((1, len(ids)),)]:
        pieces = preview(TokenRow(ids, label_spans), tokenizer)
        assert "".join(piece.text for piece in pieces) == "one two three four"
        assert sum(piece.learned for piece in pieces) == len(label_spans)


def test_preview_shortens_long_span_in_the_middle():
    tokenizer = make_tokenizer()
    (row,) = encode_examples([Example("x" * 5000, "y")], tokenizer, "auto")
    before, after = preview(row, tokenizer)
    assert (len(before.text), after) == (2003, TextSpan(text="y</s>", learned=True))


def test_preview_rows_are_spread_over_the_dataset():
    assert [shown_rows(count) for count in (0, 1, 2, 3, 30)] == [(), (0,), (0, 1), (0, 1, 2), (0, 10, 20)]
