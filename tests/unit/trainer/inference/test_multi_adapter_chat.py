"""Several adapters on one base generate the same answers as each of them alone, and so does the base."""

import pytest
import torch
from peft import PeftModel

from qlora_api.local_requests import ChatRequest, GenerationConfig
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.generation import generate_batch
from qlora_trainer.inference.multi_adapter_chat import load_multi_adapter_model
from qlora_trainer.model.base_model import TrainableModel, load_base
from qlora_trainer.model.hardware import observe_hardware
from qlora_trainer.model.runtime_settings import compute_dtype
from qlora_trainer.storage.store import MODEL_FIELD
from tests.unit.trainer.data.test_chat_template import CHATML
from tests.unit.trainer.tiny import make_tokenizer, write_model
from tests.unit.trainer.trained import PLAIN, RESOLVER, write_published
from tests.unit.trainer.tuned import NF4

SIXTEEN = QuantizationSpec(bits=16)
GENERATION = GenerationConfig(max_new_tokens=6)
IDS = torch.tensor([[3, 141, 59, 26, 5, 35]])
KINDS = {
    "plain": {},
    "low": {"rank": 2, "targets": ("v_proj",), "rslora": True},
    "dora": {"rank": 8, "targets": ("q_proj", "k_proj"), "dora": True},
    "head": {"targets": ("q_proj",), "modules_to_save": ("lm_head",)},
    "words": {"targets": ("up_proj",), "modules_to_save": ("embed_tokens", "norm")},
    "last": {"targets": ("o_proj",), "modules_to_save": ("lm_head",)},
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    write_model(folder, tie_word_embeddings=request.param)
    return folder


@pytest.fixture(scope="module")
def adapters(model):
    """One adapter of each kind, on NF4 weights."""
    return {
        name: write_published(
            model.parent / name,
            model,
            PLAIN.model_copy(update=changes),
            NF4,
            seed=number,
            job=name,
            digest=f"{number:016}",
        )
        for number, (name, changes) in enumerate(KINDS.items())
    }


def opened(*adapters, work, **request):
    uris = tuple(f"file://{adapter}" for adapter in adapters)
    return load_multi_adapter_model(ChatRequest(adapters=uris, device="cpu", **request), RESOLVER, work)


def alone(model, adapter=None, bits: QuantizationSpec = NF4) -> TrainableModel:
    """The base with one adapter, loaded with peft's public API."""
    dtype, _ = compute_dtype(observe_hardware("cpu"), "llama")
    base = load_base(model, bits, dtype, "sdpa", "cpu")
    peft = PeftModel.from_pretrained(base, adapter).eval() if adapter else base.eval()
    return TrainableModel(peft, peft.get_base_model() if adapter else base, base.device, dtype, plain_head=False)


def logits_of(trainable: TrainableModel) -> torch.Tensor:
    with torch.no_grad(), trainable.autocast():
        return trainable.model(IDS, use_cache=False).logits


@pytest.mark.parametrize("order", [1, -1], ids=["listed-order", "reversed-order"])
def test_each_adapter_answers_as_when_loaded_alone(model, adapters, order, tmp_path):
    loaded_model = opened(*list(adapters.values())[::order], work=tmp_path)
    assert {handle.label for handle in loaded_model.handles} == {"base", *KINDS}
    found = {}
    for handle in (*loaded_model.handles, *loaded_model.handles[::-1]):  # no adapter may affect the next
        reference = alone(model, adapters.get(handle.label))
        prompt = handle.prompt_builder.build([{"role": "user", "content": "What colour has the sky?"}])
        (expected,) = generate_batch(reference, [prompt], make_tokenizer(), GENERATION.max_new_tokens)
        answer = loaded_model.generate(handle, [{"role": "user", "content": "What colour has the sky?"}], GENERATION)
        assert answer == expected
        with loaded_model._active_adapter(handle):
            found[handle.label] = logits_of(loaded_model.loaded)
        torch.testing.assert_close(found[handle.label], logits_of(reference), rtol=0, atol=0)
    others = list(found.values())
    assert all(not torch.equal(one, other) for index, one in enumerate(others) for other in others[:index])


def test_16_bit_base_takes_several_adapters(model, tmp_path):
    one, other = (
        write_published(tmp_path / f"{seed}", model, PLAIN, SIXTEEN, seed=seed, method="lora", digest=f"{seed}" * 16)
        for seed in (1, 2)
    )
    loaded_model = opened(one, other, work=tmp_path)
    # Two results of one job are labeled with their digests.
    assert [handle.label for handle in loaded_model.handles] == ["base", "colours/11111111", "colours/22222222"]
    with loaded_model._active_adapter(loaded_model.handles[2]):
        torch.testing.assert_close(logits_of(loaded_model.loaded), logits_of(alone(model, other, SIXTEEN)))


def test_answer_at_the_token_limit_is_marked_incomplete(adapters, tmp_path):
    conversation = opened(adapters["plain"], work=tmp_path).start_conversation(GENERATION, keep_history=False)
    turn = conversation.ask("What colour has the sky?")
    assert turn.question == "What colour has the sky?"
    assert [(reply.by, reply.complete) for reply in turn.replies] == [("base", False), ("plain", False)]
    assert all(reply.text for reply in turn.replies)


def test_sampling_with_a_seed_is_repeatable(adapters, tmp_path):
    loaded_model = opened(adapters["plain"], work=tmp_path)

    def answer(seed: int) -> str:
        generation_config = GenerationConfig(max_new_tokens=12, temperature=1.5, seed=seed)
        return loaded_model.start_conversation(generation_config, keep_history=False).ask("What?").replies[1].text

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.fixture(scope="module")
def chat_adapter(model):
    """An adapter that was trained on chats."""
    adapter = write_published(model.parent / "chats", model, PLAIN, NF4, job="chats", format="chat", digest="f" * 16)
    (adapter / "chat_template.jinja").write_text(CHATML)
    return adapter


def test_only_chat_adapters_keep_history(adapters, chat_adapter, tmp_path):
    loaded_model = opened(adapters["plain"], chat_adapter, work=tmp_path)
    base, plain, chat = loaded_model.handles
    assert [handle.supports_history for handle in loaded_model.handles] == [False, False, True]
    conversation = loaded_model.start_conversation(
        GenerationConfig(max_new_tokens=3, system="Be brief."), keep_history=True
    )
    first, second = conversation.ask("One?"), conversation.ask("Two?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": first.replies[2].text},
        {"role": "user", "content": "Two?"},
    ]
    assert second.replies[2].text == loaded_model.generate(chat, messages, conversation.generation_config).text
    assert second.replies[1].text == loaded_model.generate(plain, messages[-1:], conversation.generation_config).text
    assert loaded_model.generate(chat, messages, conversation.generation_config) != loaded_model.generate(
        chat, messages[-1:], conversation.generation_config
    )
    conversation.reset()
    assert conversation.ask("One?") == first
    assert base.label == "base"


def test_conversation_beyond_context_length_is_rejected(chat_adapter, tmp_path):
    conversation = opened(chat_adapter, work=tmp_path).start_conversation(
        GenerationConfig(max_new_tokens=250), keep_history=True
    )
    with pytest.raises(RunError, match=r"it takes 302 tokens, but the model supports 256; lower --max-tokens"):
        conversation.ask("What colour has the sky?")


def rejection(*adapters, work, **request) -> str:
    with pytest.raises(RunError) as caught:
        opened(*adapters, work=work, **request)
    assert caught.value.reason is Reason.INVALID_SPEC
    return caught.value.message


def test_adapters_of_different_bases_are_rejected_with_the_difference(model, adapters, tmp_path):
    other = write_published(tmp_path / "other", model, PLAIN, QuantizationSpec(bits=4, type="fp4"), job="other")
    commit = RESOLVER.resolve(f"file://{model}", "main", MODEL_FIELD).commit[:12]
    assert rejection(adapters["plain"], other, work=tmp_path) == (
        f"--adapter: only one base is loaded, but plain needs file://{model} at {commit} in 4 bits (nf4, double "
        f"quantization); other needs file://{model} at {commit} in 4 bits (fp4, double quantization); load them "
        "separately"
    )


def test_given_base_model_does_not_override_quantization(model, adapters, tmp_path):
    moved = write_published(tmp_path / "moved", model, PLAIN, NF4, job="moved", base="hf://o/m", commit="c" * 40)
    uri = f"file://{model}"
    assert len(opened(adapters["plain"], moved, work=tmp_path, model=uri).handles) == 3
    assert "hf://o/m at cccccccccccc" in rejection(adapters["plain"], moved, work=tmp_path)
    eight = write_published(tmp_path / "eight", model, PLAIN, QuantizationSpec(bits=8), job="eight")
    assert "eight needs a base in 8 bits" in rejection(adapters["plain"], eight, work=tmp_path, model=uri)


def test_duplicate_adapter_is_rejected(adapters, tmp_path):
    message = rejection(adapters["plain"], adapters["plain"], work=tmp_path)
    assert message.endswith("are the same adapter; give it once")


def test_conflicting_modules_of_two_adapters_are_rejected(model, tmp_path):
    replacing = PLAIN.model_copy(update={"targets": ("v_proj",), "modules_to_save": ("q_proj",)})
    one = write_published(tmp_path / "one", model, replacing, SIXTEEN, job="full", digest="1" * 16)
    other = write_published(tmp_path / "other", model, PLAIN, SIXTEEN, job="plain", digest="2" * 16)
    for pair in ((one, other), (other, one)):
        assert rejection(*pair, work=tmp_path) == (
            "--adapter: full replaces model.layers.0.self_attn.q_proj, which plain adapts, and peft cannot load both; "
            "load them separately"
        )


def test_system_message_requires_a_chat_adapter(adapters, chat_adapter, tmp_path):
    generation_config = GENERATION.model_copy(update={"system": "Be brief."})
    with pytest.raises(RunError, match="--system: none of the adapters was trained on chats"):
        opened(adapters["plain"], work=tmp_path).start_conversation(generation_config, keep_history=False)
    assert (
        opened(chat_adapter, work=tmp_path).start_conversation(generation_config, keep_history=False).generation_config
        == generation_config
    )
