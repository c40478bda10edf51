"""Several adapters on one base answer as each of them does alone, and the base as without any."""

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
    """The base with nothing on it but one adapter, loaded by peft's own call."""
    dtype, _ = compute_dtype(observe_hardware("cpu"))
    base = load_base(model, bits, dtype, "sdpa", "cpu")
    peft = PeftModel.from_pretrained(base, adapter).eval() if adapter else base.eval()
    return TrainableModel(peft, peft.get_base_model() if adapter else base, base.device, dtype, plain_head=False)


def logits_of(trainable: TrainableModel) -> torch.Tensor:
    with torch.no_grad(), trainable.autocast():
        return trainable.model(IDS, use_cache=False).logits


@pytest.mark.parametrize("order", [1, -1], ids=["as-listed", "backwards"])
def test_each_adapter_answers_as_when_loaded_alone(model, adapters, order, tmp_path):
    panel = opened(*list(adapters.values())[::order], work=tmp_path)
    assert {speaker.label for speaker in panel.handles} == {"base", *KINDS}
    found = {}
    for speaker in (*panel.handles, *panel.handles[::-1]):  # whoever spoke before leaves no trace
        tuned = alone(model, adapters.get(speaker.label))
        prompt = speaker.prompt_builder.build([{"role": "user", "content": "What colour has the sky?"}])
        (expected,) = generate_batch(tuned, [prompt], make_tokenizer(), GENERATION.max_new_tokens)
        answer = panel.generate(speaker, [{"role": "user", "content": "What colour has the sky?"}], GENERATION)
        assert answer == expected
        with panel._active_adapter(speaker):
            found[speaker.label] = logits_of(panel.loaded)
        torch.testing.assert_close(found[speaker.label], logits_of(tuned), rtol=0, atol=0)
    others = list(found.values())
    assert all(not torch.equal(one, other) for place, one in enumerate(others) for other in others[:place])


def test_16_bit_base_takes_several_adapters(model, tmp_path):
    one, other = (
        write_published(tmp_path / f"{seed}", model, PLAIN, SIXTEEN, seed=seed, method="lora", digest=f"{seed}" * 16)
        for seed in (1, 2)
    )
    panel = opened(one, other, work=tmp_path)
    # Two results of one job are told apart by their digests.
    assert [speaker.label for speaker in panel.handles] == ["base", "colours/11111111", "colours/22222222"]
    with panel._active_adapter(panel.handles[2]):
        torch.testing.assert_close(logits_of(panel.loaded), logits_of(alone(model, other, SIXTEEN)))


def test_an_answer_that_does_not_end_is_cut_and_says_so(adapters, tmp_path):
    conversation = opened(adapters["plain"], work=tmp_path).start_conversation(GENERATION, keep_history=False)
    exchange = conversation.ask("What colour has the sky?")
    assert exchange.question == "What colour has the sky?"
    assert [(reply.by, reply.complete) for reply in exchange.replies] == [("base", False), ("plain", False)]
    assert all(reply.text for reply in exchange.replies)


def test_sampling_with_a_seed_is_repeatable(adapters, tmp_path):
    panel = opened(adapters["plain"], work=tmp_path)

    def said(seed: int) -> str:
        manner = GenerationConfig(max_new_tokens=12, temperature=1.5, seed=seed)
        return panel.start_conversation(manner, keep_history=False).ask("What?").replies[1].text

    assert said(1) == said(1)
    assert said(1) != said(2)


@pytest.fixture(scope="module")
def talker(model):
    """An adapter that was trained on chats."""
    adapter = write_published(model.parent / "talker", model, PLAIN, NF4, job="talker", format="chat", digest="f" * 16)
    (adapter / "chat_template.jinja").write_text(CHATML)
    return adapter


def test_only_chat_adapters_keep_history(adapters, talker, tmp_path):
    panel = opened(adapters["plain"], talker, work=tmp_path)
    base, plain, chat = panel.handles
    assert [speaker.supports_history for speaker in panel.handles] == [False, False, True]
    conversation = panel.start_conversation(GenerationConfig(max_new_tokens=3, system="Be brief."), keep_history=True)
    first, second = conversation.ask("One?"), conversation.ask("Two?")
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": first.replies[2].text},
        {"role": "user", "content": "Two?"},
    ]
    assert second.replies[2].text == panel.generate(chat, said, conversation.generation_config).text
    assert second.replies[1].text == panel.generate(plain, said[-1:], conversation.generation_config).text
    assert panel.generate(chat, said, conversation.generation_config) != panel.generate(
        chat, said[-1:], conversation.generation_config
    )
    conversation.reset()
    assert conversation.ask("One?") == first
    assert base.label == "base"


def test_conversation_beyond_context_length_is_refused(talker, tmp_path):
    conversation = opened(talker, work=tmp_path).start_conversation(
        GenerationConfig(max_new_tokens=250), keep_history=True
    )
    with pytest.raises(RunError, match=r"it takes 302 tokens, and the model 256 at most; ask for less, or begin anew"):
        conversation.ask("What colour has the sky?")


def refusal(*adapters, work, **request) -> str:
    with pytest.raises(RunError) as caught:
        opened(*adapters, work=work, **request)
    assert caught.value.reason is Reason.INVALID_SPEC
    return caught.value.message


def test_adapters_of_different_bases_are_refused_with_what_differs(model, adapters, tmp_path):
    other = write_published(tmp_path / "other", model, PLAIN, QuantizationSpec(bits=4, type="fp4"), job="other")
    commit = RESOLVER.resolve(f"file://{model}", "main", MODEL_FIELD).commit[:12]
    assert refusal(adapters["plain"], other, work=tmp_path) == (
        f"--adapter: one base is loaded, and plain needs file://{model} at {commit} in 4 bits (nf4, double "
        f"quantisation); other needs file://{model} at {commit} in 4 bits (fp4, double quantisation); ask those apart "
        "that differ"
    )


def test_given_base_model_does_not_override_quantization(model, adapters, tmp_path):
    moved = write_published(tmp_path / "moved", model, PLAIN, NF4, job="moved", base="hf://o/m", commit="c" * 40)
    uri = f"file://{model}"
    assert len(opened(adapters["plain"], moved, work=tmp_path, model=uri).handles) == 3
    assert "hf://o/m at cccccccccccc" in refusal(adapters["plain"], moved, work=tmp_path)
    eight = write_published(tmp_path / "eight", model, PLAIN, QuantizationSpec(bits=8), job="eight")
    assert "eight needs a base in 8 bits" in refusal(adapters["plain"], eight, work=tmp_path, model=uri)


def test_the_same_adapter_twice_is_refused(adapters, tmp_path):
    message = refusal(adapters["plain"], adapters["plain"], work=tmp_path)
    assert message.endswith("are one adapter; give it once")


def test_conflicting_modules_of_two_adapters_are_refused(model, tmp_path):
    whole = PLAIN.model_copy(update={"targets": ("v_proj",), "modules_to_save": ("q_proj",)})
    one = write_published(tmp_path / "one", model, whole, SIXTEEN, job="whole", digest="1" * 16)
    other = write_published(tmp_path / "other", model, PLAIN, SIXTEEN, job="plain", digest="2" * 16)
    for pair in ((one, other), (other, one)):
        assert refusal(*pair, work=tmp_path) == (
            "--adapter: whole has a model.layers.0.self_attn.q_proj of its own, which plain changes, and peft cannot "
            "hold both; ask them apart"
        )


def test_a_system_message_is_for_chats(adapters, talker, tmp_path):
    manner = GENERATION.model_copy(update={"system": "Be brief."})
    with pytest.raises(RunError, match="--system: none of the adapters was trained on chats"):
        opened(adapters["plain"], work=tmp_path).start_conversation(manner, keep_history=False)
    assert opened(talker, work=tmp_path).start_conversation(manner, keep_history=False).generation_config == manner
