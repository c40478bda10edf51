"""What a server that knows no chat template reads of a published model: it ends answers as evaluation did."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.model.full_finetune import save_full_model
from qlora_trainer.publishing.merge_weights import merge_adapter
from qlora_trainer.publishing.stop_tokens import save_stop_tokens, trained_stop_token
from tests.unit.trainer.tiny import make_tokenizer, write_model
from tests.unit.trainer.trained import PLAIN, write_trained
from tests.unit.trainer.tuned import NF4, make_trainable

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_EOS = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"


def chat_tokenizer(template: str = CHATML) -> tuple[Any, int]:
    """The tokenizer of a base model, whose EOS token is not what its chat template ends turns with."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>")


def rows_ending_with(*tokens: int) -> list[TokenRow]:
    return [TokenRow((1, 2, 3, token), ((1, 2), (2, 4))) for token in tokens]


def test_trap_50_server_stops_at_the_token_that_was_trained(tmp_path):
    trainable, (tokenizer, end) = make_trainable(vocab_size=400), chat_tokenizer()
    save_stop_tokens(trainable.model, tokenizer, rows_ending_with(end, end, 7), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [end, 1]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == 1  # evaluation and report still use it


def test_trap_50_merged_model_stops_at_the_token_that_was_trained(tmp_path):
    task = write_trained(tmp_path, PLAIN, NF4, vocab_size=400)
    tokenizer, end = chat_tokenizer()
    save_stop_tokens(make_trainable(vocab_size=400).model, tokenizer, rows_ending_with(end), task.adapter)
    merge_adapter(task, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == merged.config.eos_token_id == [end, 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token_id == end


def test_rows_of_text_keep_the_eos_token_and_stops_of_the_base(tmp_path):
    trainable, tokenizer = make_trainable(), make_tokenizer()
    trainable.model.generation_config.eos_token_id = [5, 1]
    trainable.model.generation_config.temperature = 0.6  # beside do_sample=False, as in many bases
    save_stop_tokens(trainable.model, tokenizer, rows_ending_with(1), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 5]
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 1


def test_eos_token_that_the_template_writes_is_kept(tmp_path):
    tokenizer, end = chat_tokenizer(WITH_EOS)
    model = make_trainable(vocab_size=400).model
    model.generation_config.eos_token_id = end
    save_stop_tokens(model, tokenizer, rows_ending_with(end), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 1
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [end, 1]


@pytest.mark.parametrize(
    ("last_tokens", "expected"), [((9, 9, 1), 9), ((9, 1, 1, 7, 7, 7), 1), ((7, 7), None), ((), None)]
)
def test_trained_stop_token_is_the_most_frequent_one_among_stops(last_tokens, expected):
    assert trained_stop_token(rows_ending_with(*last_tokens), [1, 9]) == expected


def test_full_model_with_conflicting_generation_settings_is_saved(tmp_path):
    folder = Path(write_model(tmp_path / "base").removeprefix("file://"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    with pytest.raises(ValueError, match="invalid"):
        model.save_pretrained(tmp_path / "by-default")
    save_full_model(model, "hf://org/name", tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["temperature"] == 0.6
    assert model.generation_config.temperature == 0.6
