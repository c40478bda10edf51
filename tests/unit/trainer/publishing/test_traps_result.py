"""Known mistakes of other trainers that corrupt a result, in merging, saving and generation (traps 4, 17 to 20, 31)."""

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

ROWS = [TokenRow(tuple(range(2, 30)), ((9, 28),), tuple(range(2, 2 + length)), "p", "r") for length in (7, 3, 5)]


def test_trap_4_answer_ends_at_any_eos_token_of_the_model():
    trainable, tokenizer = make_trainable(), make_tokenizer()
    before = generate_answers(trainable, ROWS[:1], tokenizer, batch_size=1, max_new_tokens=8)[0]
    fourth = tokenizer(before)["input_ids"][3]
    trainable.model.generation_config.eos_token_id = [1, fourth]
    after = generate_answers(trainable, ROWS[:1], tokenizer, batch_size=1, max_new_tokens=8)[0]
    assert stop_tokens(trainable.model, tokenizer) == [1, fourth]
    assert len(after) < len(before)
    assert before.startswith(after)


PHI_3 = (  # of microsoft/Phi-3-mini-4k-instruct, whose tokenizer has another EOS token
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_trap_4_answer_ends_at_the_turn_end_token_of_the_template():
    tokenizer, trainable = make_tokenizer(), make_trainable(vocab_size=400)
    before = generate_answers(trainable, ROWS[:1], tokenizer, batch_size=1, max_new_tokens=8)[0]
    first, second, third, fourth, *_ = tokenizer(before)["input_ids"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    weight = trainable.model.get_input_embeddings().weight
    with torch.no_grad():  # swap the fourth token of the answer and <|end|>
        weight[[fourth, end]] = weight[[end, fourth]]
    (unstopped,) = generate_batch(trainable, [ROWS[0].prompt_ids], tokenizer, 8)
    tokenizer.chat_template = PHI_3
    (answer,) = generate_batch(trainable, [ROWS[0].prompt_ids], tokenizer, 8)
    assert stop_tokens(trainable.model, tokenizer) == [1, end]
    assert (unstopped.complete, answer) == (False, (tokenizer.decode([first, second, third]), True))


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ messages[-1].content }}"])
def test_template_without_turn_end_token_adds_no_stop_token(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert stop_tokens(make_trainable().model, tokenizer) == [1]


def test_trap_4_batched_prompts_get_the_same_answers_as_single_ones():
    trainable, tokenizer = make_trainable(), make_tokenizer()
    single = generate_answers(trainable, ROWS, tokenizer, batch_size=1, max_new_tokens=8)
    assert generate_answers(trainable, ROWS, tokenizer, batch_size=3, max_new_tokens=8) == single
    assert len(set(single)) == 3


def test_trap_17_small_update_survives_the_merge(tmp_path):
    """Sums are computed in fp32 and rounded once; peft's merge in bf16 rounds twice and differs."""
    task = write_trained(tmp_path, PLAIN, QuantizationSpec(bits=16))
    merge_adapter(task, tmp_path / "merged")
    merged_weights = load_file(tmp_path / "merged/model.safetensors")

    def merged_in(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        base = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
        merged = PeftModel.from_pretrained(base, task.adapter).merge_and_unload(safe_merge=True)
        return {name: weight.to(torch.bfloat16) for name, weight in merged.state_dict().items()}

    exact, rounded_twice = merged_in(torch.float32), merged_in(torch.bfloat16)
    assert all(torch.equal(weight, exact[name]) for name, weight in merged_weights.items())
    assert not all(torch.equal(weight, rounded_twice[name]) for name, weight in merged_weights.items())


@pytest.mark.parametrize("tied", [True, False])
def test_trap_18_embeddings_stay_tied_or_untied(tmp_path, tied):
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


def test_trap_19_saving_sends_no_request_to_the_hub(tmp_path, monkeypatch):
    def request(*_: object) -> bool:
        raise AssertionError("the hub was called")

    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", request)
    write_model(tmp_path / "model")
    trainable = load_with_adapter(tmp_path / "model", PLAIN, NF4)
    trainable.wrapped.peft_config["default"].base_model_name_or_path = "org/name"
    write_weights(trainable, make_tokenizer(), make_record(NF4), tmp_path)
    with pytest.raises(AssertionError, match="the hub was called"):
        trainable.wrapped.save_pretrained(tmp_path / "by-default")


def test_trap_20_adapter_has_no_local_path():
    text = json.dumps({"base_model_name_or_path": "/work/hub/x", "revision": None, "target_modules": ["v", "k", "q"]})
    hub = json.loads(canonical_config(text, "hf://org/name", "abc"))
    assert hub == {"base_model_name_or_path": "org/name", "revision": "abc", "target_modules": ["k", "q", "v"]}
    bucket = json.loads(canonical_config(text, "s3://models/name", "abc"))
    assert (bucket["base_model_name_or_path"], bucket["revision"]) == ("s3://models/name", None)


def test_trap_31_saved_weights_equal_the_trained_ones(tmp_path):
    write_model(tmp_path / "model")
    trainable = load_with_adapter(tmp_path / "model", PLAIN, NF4)
    saved = load_file(
        write_weights(trainable, make_tokenizer(), make_record(NF4), tmp_path) / "adapter_model.safetensors"
    )
    trained = {
        name.replace(".default", ""): weight
        for name, weight in trainable.wrapped.named_parameters()
        if weight.requires_grad
    }
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
