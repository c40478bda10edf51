"""From files to token rows: long rows, weights, statistics and memory."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_api.reasons import Reason
from qlora_api.runconfig import Platform
from qlora_api.v1alpha1 import RowLengths
from qlora_trainer.data import row_encoder, shards
from qlora_trainer.data.dataset import check_loss, describe_lengths, describe_sources, open_dataset, scan_rows
from qlora_trainer.data.row_encoder import RowEncoder
from qlora_trainer.data.rows import Example
from qlora_trainer.data.tokenized_dataset import TokenizedDataset, tokenize_dataset
from qlora_trainer.errors import RunError
from qlora_trainer.storage.credentials import environment_secrets
from qlora_trainer.storage.snapshots import SourceResolver
from tests.unit.trainer.tiny import make_spec, make_tokenizer, write_rows

RESOLVER = SourceResolver(Platform(), environment_secrets())
WORD_LENGTHS = (1, 2, 3, 40, 50)


class WordTokenizer:
    """One token per word."""

    bos_token_id, eos_token_id, eos_token = None, 0, "</s>"

    def __call__(self, texts, add_special_tokens):  # noqa: ARG002 (the real signature)
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def words(count: int) -> dict[str, str]:
    return {"prompt": "say ", "completion": " ".join(["word"] * count)}


@contextmanager
def tokens_of(tmp_path: Path, tokenizer=None, **blocks) -> Iterator[TokenizedDataset]:
    spec = make_spec("file:///model", "", "file:///output", **blocks)
    dataset = open_dataset(spec, RESOLVER, tmp_path)
    rows = scan_rows(dataset, spec.dataset.evaluation.fraction)
    encoder = RowEncoder(tokenizer or WordTokenizer(), spec.training.loss, None)
    with tokenize_dataset(dataset, rows, encoder, spec.training, tmp_path / "work") as made:
        yield made


def two_files(tmp_path: Path) -> dict[str, object]:
    training = write_rows(tmp_path / "rows.jsonl", [words(count) for count in WORD_LENGTHS])
    held_out = write_rows(tmp_path / "held-out.jsonl", [words(4), words(60)])
    return {"uri": training, "evaluation": {"uri": held_out}}


@pytest.mark.parametrize(
    ("policy", "kept", "truncated", "dropped"),
    [
        pytest.param("truncate", [3, 4, 5, 16, 16], 3, 0, id="truncate"),
        pytest.param("drop", [3, 4, 5], 0, 3, id="drop"),
    ],
)
def test_long_rows_are_truncated_or_dropped_and_counted(tmp_path, policy, kept, truncated, dropped):
    training = {"maxLength": 16, "longRows": policy}
    with tokens_of(tmp_path, dataset=two_files(tmp_path), training=training) as made:
        assert [len(row.input_ids) for row in shards.read_token_rows(made.training_file)] == kept
        status = made.status
    assert (status.training_rows, status.truncated_rows, status.dropped_rows) == (len(kept), truncated, dropped)
    assert status.training_tokens == sum(kept)
    assert status.longest_row_tokens == 62
    assert status.row_lengths == RowLengths(mean=24.9, p50=6, p95=62, p99=62)
    assert not made.folder.exists()


def test_refused_long_rows_are_listed_with_lengths_and_leave_no_files(tmp_path):
    with (
        pytest.raises(RunError) as caught,
        tokens_of(tmp_path, dataset=two_files(tmp_path), training={"maxLength": 16, "longRows": "refuse"}),
    ):
        pass
    assert caught.value.reason == Reason.DATASET_INVALID
    assert "3 rows have more than maxLength 16 tokens (row 4: 42 tokens; row 5: 52 tokens; row 2: 62" in (
        caught.value.message
    )
    assert not list((tmp_path / "work" / "tokens").iterdir())


def test_row_truncated_before_its_answer_is_dropped(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "word " * 20, "completion": "x"}, words(1)])
    dataset = {"uri": rows, "evaluation": {"uri": write_rows(tmp_path / "held-out.jsonl", [words(2)])}}
    with tokens_of(tmp_path, dataset=dataset, training={"maxLength": 16}) as made:
        assert (made.status.training_rows, made.status.dropped_rows, made.status.truncated_rows) == (1, 1, 0)
    with tokens_of(tmp_path, dataset=dataset, training={"maxLength": 16, "loss": "all"}) as made:
        assert (made.status.training_rows, made.status.dropped_rows, made.status.truncated_rows) == (2, 0, 1)


def test_row_counts_are_logged(tmp_path):
    spec = make_spec("file:///model", "", "file:///output", dataset=two_files(tmp_path), training={"maxLength": 16})
    with tokens_of(tmp_path, dataset=two_files(tmp_path), training={"maxLength": 16}) as made:
        lines = list(describe_lengths(made.status, spec.training))
    assert lines == [
        "44 training tokens; the longest row has 62",
        "tokens per row: mean 24.9, median 6, 95th percentile 62, 99th percentile 62",
        "3 rows are truncated to 16 tokens",
    ]


def sources(tmp_path: Path) -> list[dict[str, object]]:
    one = write_rows(tmp_path / "one.jsonl", [words(count) for count in range(1, 11)])
    (tmp_path / "two.csv").write_text("text\n" + "".join(f"{'text ' * count}\n" for count in range(21, 31)))
    return [{"uri": one, "weight": 2.5}, {"uri": f"file://{tmp_path / 'two.csv'}", "weight": 0.5, "maxSamples": 8}]


def test_sources_are_mixed_by_weight_and_validation_rows_not_repeated(tmp_path):
    dataset = {"uri": None, "sources": sources(tmp_path), "evaluation": {"fraction": 0.23}}
    with tokens_of(tmp_path, dataset=dataset) as made:
        training = [row.input_ids for row in shards.read_token_rows(made.training_file)]
        held_out = [row.input_ids for row in shards.read_token_rows(made.held_out_file)]
        status = made.status
    assert len(held_out) == len(set(held_out)) == 4
    assert not set(held_out) & set(training)
    answers, texts = [ids for ids in training if len(ids) < 13], [ids for ids in training if len(ids) > 20]
    ours = 10 - sum(len(ids) < 13 for ids in held_out)
    assert len(answers) == 2 * ours + round(ours / 2)
    assert len(texts) == len(set(texts)) == round((8 - (4 - (10 - ours))) / 2)
    assert (status.format, status.training_rows) == ("completion+text", len(training))


def test_detected_formats_are_logged(tmp_path):
    spec = make_spec("file:///m", "", "file:///o", dataset={"uri": None, "sources": sources(tmp_path)})
    assert list(describe_sources(open_dataset(spec, RESOLVER, tmp_path))) == [
        "spec.dataset.sources[0].uri: one.jsonl: completion rows, detected by the field 'prompt' of row 1, weight 2.5",
        "spec.dataset.sources[1].uri: two.csv: text rows, detected by the field 'text' of row 2, weight 0.5",
    ]


@pytest.mark.parametrize(("loss", "fine"), [("auto", True), ("all", True), ("completion", False), ("assistant", False)])
def test_text_rows_with_completion_loss_are_refused(tmp_path, loss, fine):
    spec = make_spec("file:///m", "", "file:///o", dataset={"uri": None, "sources": sources(tmp_path)})
    dataset = open_dataset(spec, RESOLVER, tmp_path)
    if fine:
        check_loss(loss, dataset)
        return
    with pytest.raises(RunError, match=r"spec\.training\.loss: .* spec\.dataset\.sources\[1\]\.uri has text rows"):
        check_loss(loss, dataset)


def test_invalid_row_of_a_source_names_the_field(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [words(1), {"prompt": "x"}])
    dataset = {"uri": None, "sources": [{"uri": rows}]}
    with pytest.raises(RunError) as caught, tokens_of(tmp_path, dataset=dataset):
        pass
    assert caught.value.message.startswith("spec.dataset.sources[0].uri: 1 of 2 rows")


def test_tokenize_keeps_one_batch_of_rows_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(row_encoder, "BATCH_ROWS", 50)
    monkeypatch.setattr(shards, "GROUP_ROWS", 50)
    alive: list[int] = []

    class CountingTokenizer(WordTokenizer):
        def __call__(self, texts, add_special_tokens):
            alive.append(sum(type(found) is Example for found in gc.get_objects()))
            return super().__call__(texts, add_special_tokens)

    rows = [{"prompt": f"say {number}", "completion": "x"} for number in range(2000)]
    dataset = {"uri": write_rows(tmp_path / "rows.jsonl", rows)}
    gc.freeze()  # leaves out a million objects of the libraries, at every look
    try:
        with tokens_of(tmp_path, CountingTokenizer(), dataset=dataset) as made:
            assert made.status.training_rows == 1600
    finally:
        gc.unfreeze()
    assert len(alive) == 2 * 2000 / 50
    assert max(alive) <= 2 * 50


def test_seed_template_renders_as_before(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"instruction": f"Say {number}", "output": f"It is {number}."} for number in range(4)]
    with tokens_of(tmp_path, tokenizer, dataset={"uri": write_rows(tmp_path / "rows.jsonl", rows)}) as made:
        texts = {tokenizer.decode(row.input_ids) for row in shards.read_token_rows(made.training_file)}
        (held_out,) = shards.read_token_rows(made.held_out_file)
    everything = {f"### Instruction:\nSay {number}\n\n### Response:\nIt is {number}.</s>" for number in range(4)}
    assert texts == everything - {tokenizer.decode(held_out.input_ids)}


def test_validation_source_has_the_format_of_a_single_source(tmp_path):
    spec = make_spec("file:///m", "", "file:///o", dataset=two_files(tmp_path))
    assert list(describe_sources(open_dataset(spec, RESOLVER, tmp_path)))[1:] == [
        "spec.dataset.evaluation.uri: held-out.jsonl: completion rows, same format as spec.dataset.uri"
    ]
