"""Rows as the model sees them, in the log and in the report."""

from qlora_api.report import TextSpan
from qlora_trainer.data.preview import format_preview, preview, shown_rows
from qlora_trainer.data.rows import Example
from qlora_trainer.data.tokenization import TokenRow, encode_examples
from tests.unit.trainer.tiny import make_tokenizer


def test_what_is_learned_is_marked_with_its_end():
    tokenizer = make_tokenizer(bos=True)
    (row,) = encode_examples([Example("Sky?\n", "Blue ⟦🦙⟧.")], tokenizer, "auto")
    assert format_preview(preview(row, tokenizer)) == "<s>Sky?\n⟦Blue ⟦🦙⟧.</s>⟧"


def test_pieces_cover_the_row_whatever_is_learned():
    tokenizer = make_tokenizer()
    ids = tuple(tokenizer("one two three four")["input_ids"])
    for learned in [(), ((1, 2),), ((1, 3), (4, 5)), ((1, len(ids)),)]:
        pieces = preview(TokenRow(ids, learned), tokenizer)
        assert "".join(piece.text for piece in pieces) == "one two three four"
        assert sum(piece.learned for piece in pieces) == len(learned)


def test_a_long_piece_is_shortened_in_its_middle():
    tokenizer = make_tokenizer()
    (row,) = encode_examples([Example("x" * 5000, "y")], tokenizer, "auto")
    before, after = preview(row, tokenizer)
    assert (len(before.text), after) == (2003, TextSpan(text="y</s>", learned=True))


def test_the_rows_that_are_shown_are_spread():
    assert [shown_rows(count) for count in (0, 1, 2, 3, 30)] == [(), (0,), (0, 1), (0, 1, 2), (0, 10, 20)]
