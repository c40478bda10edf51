"""Traps 3 to 7: tokens and labels of a row, checked in the shards that prepare writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.data import shards
from qlora_trainer.data.batching import collate
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.prepare import prepare
from tests.unit.trainer.tiny import (
    CPU,
    instruction_rows,
    make_spec,
    make_tokenizer,
    prepare_config,
    write_model,
    write_rows,
)

START, END = make_tokenizer().bos_token_id, make_tokenizer().eos_token_id


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """A model whose tokenizer adds no start token, and one whose tokenizer does."""
    folders = {bos: tmp_path_factory.mktemp("model") for bos in (False, True)}
    uris = {bos: write_model(folder) for bos, folder in folders.items()}
    for bos, folder in folders.items():
        make_tokenizer(bos=bos).save_pretrained(folder)
    return uris


def prepared_rows(
    model: str, rows: Sequence[Any], folder: Path, dataset: dict[str, Any] | None = None, **training: Any
) -> tuple[TokenRow, ...]:
    """Return the training rows that prepare writes."""
    uris = model, write_rows(folder / "rows.jsonl", rows), f"file://{folder / 'output'}"
    spec = make_spec(*uris, dataset=dataset or {}, training=training)
    prefix = prepare(prepare_config(spec), work=folder).prefix.removeprefix("file://")
    return tuple(shards.read_token_rows(Path(prefix) / shards.TRAINING))


def completions(prompt: str, completion: str, count: int = 10) -> list[dict[str, str]]:
    """Return distinct rows whose prompts have the same ending."""
    return [{"prompt": f"{number} {prompt}", "completion": completion} for number in range(count)]


def label_text(row: TokenRow) -> str:
    """Return the decoded labels."""
    ids = [token for start, end in row.label_spans for token in row.input_ids[start:end]]
    return str(make_tokenizer().decode(ids))


@pytest.mark.parametrize("packing", [True, False])
def test_trap_03_end_token_is_a_label_although_it_is_also_the_padding_token(models, tmp_path, packing):
    rows = prepared_rows(models[False], instruction_rows(), tmp_path)
    assert make_tokenizer().pad_token_id == END
    labels = collate(rows, CPU, packing=packing).labels
    assert int((labels == END).sum()) == len(rows)
    assert len(labels) == sum(row.label_count for row in rows)


def test_trap_03_padding_is_never_a_label(models, tmp_path):
    rows = prepared_rows(models[False], instruction_rows(), tmp_path)
    batch = collate(rows, CPU, packing=False)
    width = batch.input_ids.shape[1]
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    assert lengths.min() < width
    assert bool((batch.label_positions % width + 1 < lengths[batch.label_positions // width]).all())


@pytest.mark.parametrize("loss", ["completion", "all"])
def test_trap_04_last_token_of_a_row_is_the_end_token_and_a_label(models, tmp_path, loss):
    for row in prepared_rows(models[False], instruction_rows(), tmp_path, loss=loss):
        assert row.input_ids[-1] == END
        assert row.label_spans[-1][1] == len(row.input_ids)


def test_trap_04_assistant_turns_are_labels_up_to_their_stop_token(models, tmp_path):
    template = "{% for message in messages %}{{ message.role }}:\n{{ message.content }}</s>\n{% endfor %}"
    generation_prompt = "{% if add_generation_prompt %}assistant:\n{% endif %}"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Colour {number}?"},
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "yes, blue"},
            ]
        }
        for number in range(10)
    ]
    for row in prepared_rows(models[False], rows, tmp_path, {"chatTemplate": template + generation_prompt}):
        assert len(row.label_spans) == 2
        assert label_text(row) == "red</s>yes, blue</s>"


def test_trap_05_row_has_one_start_token_with_or_without_one_in_its_text(models, tmp_path):
    rows = [*completions("sky", " blue"), *({**row, "prompt": f"<s>{row['prompt']}"} for row in completions("a", "b"))]
    for row in prepared_rows(models[True], rows, tmp_path):
        assert row.input_ids[0] == START
        assert row.input_ids.count(START) == 1


def test_trap_06_token_across_prompt_and_answer_is_a_label(models, tmp_path):
    tokenizer = make_tokenizer()
    prompt, full = (tokenizer(text)["input_ids"] for text in ("What colour has the s", "What colour has the sky"))
    assert full[: len(prompt)] != prompt  # " sky" is one token: the prompt is no prefix
    for row in prepared_rows(models[False], completions("colour has the s", "ky"), tmp_path):
        assert label_text(row) == " sky</s>"


def test_trap_07_row_with_truncated_answer_is_dropped(models, tmp_path):
    long = [{"instruction": f"{number} {'word ' * 100}", "output": "lost"} for number in range(20)]
    rows = prepared_rows(models[False], [*instruction_rows(), *long], tmp_path)
    assert all(row.label_count > 0 for row in rows)
    assert not any("lost" in label_text(row) for row in rows)
    assert len(collate(rows, CPU, packing=True).labels) == sum(row.label_count for row in rows)
