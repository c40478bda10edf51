"""Mistakes of well-known trainers that spoil a result: merging, saving and answering (traps 4, 17 to 20, 31)."""

import json

import peft.utils.save_and_load
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.tokenization import TokenRow
from qlora_trainer.evaluation.generation import generate_answers, generate_batch, stop_tokens
from qlora_trainer.publishing.merge_weights import merge_adapter
from qlora_trainer.publishing.publish import canonical_config, write_weights
from tests.unit.trainer.tiny import make_tokenizer, write_model
from tests.unit.trainer.trained import PLAIN, load_with_adapter, make_record, with_base, write_trained
from tests.unit.trainer.tuned import NF4, make_trainable

ASKED = [TokenRow(tuple(range(2, 30)), ((9, 28),), tuple(range(2, 2 + length)), "p", "r") for length in (7, 3, 5)]


def test_trap_4_an_answer_ends_with_any_token_that_the_model_names():
    tuned, tokenizer = make_trainable(), make_tokenizer()
    before = generate_answers(tuned, ASKED[:1], tokenizer, batch_size=1, max_new_tokens=8)[0]
    fourth = tokenizer(before)["input_ids"][3]
    tuned.model.generation_config.eos_token_id = [1, fourth]
    after = generate_answers(tuned, ASKED[:1], tokenizer, batch_size=1, max_new_tokens=8)[0]
    assert stop_tokens(tuned.model, tokenizer) == [1, fourth]
    assert len(after) < len(before)
    assert before.startswith(after)


PHI_3 = (  # of microsoft/Phi-3-mini-4k-instruct, whose tokenizer ends a text with another token
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_trap_4_an_answer_ends_with_the_token_that_ends_a_turn_of_the_template():
    tokenizer, tuned = make_tokenizer(), make_trainable(vocab_size=400)
    before = generate_answers(tuned, ASKED[:1], tokenizer, batch_size=1, max_new_tokens=8)[0]
    first, second, third, fourth, *_ = tokenizer(before)["input_ids"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    weight = tuned.model.get_input_embeddings().weight
    with torch.no_grad():  # the model, which says the fourth token, says <|end|> instead
        weight[[fourth, end]] = weight[[end, fourth]]
    (endless,) = generate_batch(tuned, [ASKED[0].prompt_ids], tokenizer, 8)
    tokenizer.chat_template = PHI_3
    (answer,) = generate_batch(tuned, [ASKED[0].prompt_ids], tokenizer, 8)
    assert stop_tokens(tuned.model, tokenizer) == [1, end]
    assert (endless.complete, answer) == (False, (tokenizer.decode([first, second, third]), True))


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ messages[-1].content }}"])
def test_a_template_that_ends_no_turn_ends_no_answer(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert stop_tokens(make_trainable().model, tokenizer) == [1]


def test_trap_4_a_shorter_prompt_beside_a_longer_one_gets_the_answer_that_it_gets_alone():
    tuned, tokenizer = make_trainable(), make_tokenizer()
    alone = generate_answers(tuned, ASKED, tokenizer, batch_size=1, max_new_tokens=8)
    assert generate_answers(tuned, ASKED, tokenizer, batch_size=3, max_new_tokens=8) == alone
    assert len(set(alone)) == 3


def test_trap_17_a_small_update_survives_the_merge(tmp_path):
    """Sums are made in fp32 and rounded once; rounded before and after, as by peft's safe merge, they differ."""
    task = write_trained(tmp_path, PLAIN, QuantizationSpec(bits=16))
    merge_adapter(task, tmp_path / "merged")
    found = load_file(tmp_path / "merged/model.safetensors")

    def merged_in(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        base = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
        merged = PeftModel.from_pretrained(base, task.adapter).merge_and_unload(safe_merge=True)
        return {name: weight.to(torch.bfloat16) for name, weight in merged.state_dict().items()}

    exact, rough = merged_in(torch.float32), merged_in(torch.bfloat16)
    assert all(torch.equal(weight, exact[name]) for name, weight in found.items())
    assert not all(torch.equal(weight, rough[name]) for name, weight in found.items())


@pytest.mark.parametrize("tied", [True, False])
def test_trap_18_embeddings_stay_one_weight_or_two(tmp_path, tied):
    task = write_trained(tmp_path, PLAIN, NF4, tie_word_embeddings=tied)
    merge_adapter(with_base(task, "dequantised"), tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) is not tied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_trap_18_module_to_save_keeps_its_own_weight_after_merge(tmp_path, module):
    task = write_trained(tmp_path, PLAIN.model_copy(update={"modules_to_save": (module,)}), NF4)
    assert merge_adapter(with_base(task, "dequantised"), tmp_path / "merged").difference.relative < 0.03


def test_trap_19_saving_asks_no_hub_about_the_vocabulary(tmp_path, monkeypatch):
    def ask(*_: object) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", ask)
    write_model(tmp_path / "model")
    tuned = load_with_adapter(tmp_path / "model", PLAIN, NF4)
    tuned.wrapped.peft_config["default"].base_model_name_or_path = "org/name"
    write_weights(tuned, make_tokenizer(), make_record(NF4), tmp_path)
    with pytest.raises(AssertionError, match="the hub was asked"):
        tuned.wrapped.save_pretrained(tmp_path / "by-default")


def test_trap_20_no_path_of_this_computer_gets_into_the_adapter():
    text = json.dumps({"base_model_name_or_path": "/work/hub/x", "revision": None, "target_modules": ["v", "k", "q"]})
    hub = json.loads(canonical_config(text, "hf://org/name", "abc"))
    assert hub == {"base_model_name_or_path": "org/name", "revision": "abc", "target_modules": ["k", "q", "v"]}
    bucket = json.loads(canonical_config(text, "s3://models/name", "abc"))
    assert (bucket["base_model_name_or_path"], bucket["revision"]) == ("s3://models/name", None)


def test_trap_31_what_is_saved_is_what_was_trained(tmp_path):
    write_model(tmp_path / "model")
    tuned = load_with_adapter(tmp_path / "model", PLAIN, NF4)
    saved = load_file(write_weights(tuned, make_tokenizer(), make_record(NF4), tmp_path) / "adapter_model.safetensors")
    trained = {
        name.replace(".default", ""): weight
        for name, weight in tuned.wrapped.named_parameters()
        if weight.requires_grad
    }
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
