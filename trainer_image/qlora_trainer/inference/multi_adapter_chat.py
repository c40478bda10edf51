"""Chat with several adapters on one base that is loaded once."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftConfig, PeftModel

from qlora_api.accelerators import DeviceName
from qlora_api.local_requests import ChatRequest, ChatTurn, GenerationConfig, Reply
from qlora_api.reasons import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.rows import Message
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.generation import Answer, generate_batch
from qlora_trainer.inference.compatibility import check_adapter_weights, check_compatible
from qlora_trainer.inference.prompts import PromptBuilder, make_prompt_builder
from qlora_trainer.inference.published_adapter import PublishedAdapter, fetch_base, open_adapter
from qlora_trainer.inference.vllm_limits import read_shapes
from qlora_trainer.model.architecture import load_tokenizer
from qlora_trainer.model.attention import attention_facts, choose_attention
from qlora_trainer.model.base_model import TrainableModel, load_base, load_text_config
from qlora_trainer.model.hardware import observe_hardware
from qlora_trainer.model.runtime_settings import compute_dtype
from qlora_trainer.model.weight_check import reading_model
from qlora_trainer.observability.progress import LogFn, no_log
from qlora_trainer.storage.snapshots import SourceResolver

ADAPTER_FIELD: Final = "--adapter"
BASE_LABEL: Final = "base"
"""The label of the model without any adapter."""
_NO_PROBABILITIES: Final = "probability tensor contains"
"""Of torch's error when it samples from outputs that are infinite or not a number."""
_DIGEST_DIGITS: Final = 8
"""Digits of the digest in a label, to distinguish two results of one job."""


@dataclass(frozen=True)
class AdapterHandle:
    """The base or an adapter, and its prompt format."""

    label: str
    prompt_builder: PromptBuilder
    adapter_name: str | None = None
    """Name of the adapter in peft; None for the base."""

    @property
    def supports_history(self) -> bool:
        """Return whether its prompts can include earlier messages."""
        return self.prompt_builder.chat is not None


@dataclass(frozen=True)
class MultiAdapterModel:
    """A loaded base with its adapters."""

    loaded: TrainableModel
    handles: tuple[AdapterHandle, ...]

    def start_conversation(self, generation_config: GenerationConfig, *, keep_history: bool) -> "Conversation":
        """Start a conversation with an empty history; raise RunError if no adapter supports a system message."""
        if generation_config.system and not any(handle.supports_history for handle in self.handles):
            raise RunError(
                Reason.INVALID_SPEC,
                "--system: none of the adapters was trained on chats, so none has a system message; omit the option",
            )
        return Conversation(self, generation_config, keep_history)

    def generate(
        self, handle: AdapterHandle, messages: Sequence[Message], generation_config: GenerationConfig
    ) -> Answer:
        """Return the answer of one adapter or the base to the last message."""
        prompt = handle.prompt_builder.build(messages)
        self._check_length(len(prompt) + generation_config.max_new_tokens)
        torch.manual_seed(generation_config.seed)
        with self._active_adapter(handle), torch.no_grad(), _generating(handle.label):
            tokenizer = handle.prompt_builder.tokenizer
            return generate_batch(
                self.loaded, [prompt], tokenizer, generation_config.max_new_tokens, sampling_options(generation_config)
            )[0]

    @contextlib.contextmanager
    def _active_adapter(self, handle: AdapterHandle) -> Iterator[None]:
        if handle.adapter_name is None:
            with self.loaded.wrapped.disable_adapter():
                yield
        else:
            self.loaded.wrapped.set_adapter(handle.adapter_name, inference_mode=True)
            yield

    def _check_length(self, tokens: int) -> None:
        max_tokens = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if max_tokens is not None and tokens > max_tokens:
            raise RunError(
                Reason.INVALID_SPEC,
                f"the question: with the history and --max-tokens it takes {tokens} tokens, but the model supports "
                f"{max_tokens}; lower --max-tokens, or start a new conversation",
            )


@contextlib.contextmanager
def _generating(label: str) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot answer, or whose outputs are no numbers, into RunError."""
    try:
        with reading_model(label, "it cannot generate an answer"):
            yield
    except RuntimeError as error:
        if _NO_PROBABILITIES not in str(error):
            raise
        raise RunError(
            Reason.MODEL_UNSUPPORTED,
            f"{label}: its outputs are not finite, so that no answer can be sampled; use another base or adapter",
        ) from error


@dataclass
class Conversation:
    """Questions to the base and all adapters, with the history of each."""

    model: MultiAdapterModel
    generation_config: GenerationConfig
    keep_history: bool
    """Include earlier messages in the prompts of adapters that support it."""
    _history: dict[str, list[Message]] = field(default_factory=dict)

    def ask(self, question: str, note: LogFn = no_log) -> ChatTurn:
        """Return the answers of all, one after the other; `note` is called with each label first."""
        replies = []
        for handle in self.model.handles:
            note(handle.label)
            replies.append(self._reply(handle, question))
        return ChatTurn(question=question, replies=tuple(replies))

    def reset(self) -> None:
        """Clear the history."""
        self._history.clear()

    def _reply(self, handle: AdapterHandle, question: str) -> Reply:
        initial: list[Message] = (
            [{"role": "system", "content": self.generation_config.system}] if self.generation_config.system else []
        )
        messages = [*self._history.get(handle.label, initial), {"role": "user", "content": question}]
        answer = self.model.generate(handle, messages, self.generation_config)
        if self.keep_history and handle.supports_history:
            self._history[handle.label] = [*messages, {"role": "assistant", "content": answer.text}]
        return Reply(by=handle.label, text=answer.text, complete=answer.complete)


def load_multi_adapter_model(
    request: ChatRequest, resolver: SourceResolver, work: Path, note: LogFn = no_log
) -> MultiAdapterModel:
    """Download adapters and base, check that they fit together, and load them."""
    adapters = [open_adapter(resolver, uri, ADAPTER_FIELD, work) for uri in request.adapters]
    for published in adapters:
        check_adapter_weights(published.folder)
    labels = label_adapters(adapters)
    for label, published in labels.items():
        if published.caveat:
            note(f"{label}: {published.uri}{published.caveat}")
    check_same_base(labels, base_given=request.model is not None)
    check_module_conflicts(labels)
    folder = fetch_base(resolver, adapters[0].record, request.model, work)
    for published in adapters:
        check_compatible(published, folder, "--base-model" if request.model else "the adapter's base")
    model = _load(labels, folder, request.device)
    record = adapters[0].record
    note(f"{request.model or record.base} in {describe_bits(record.quantization)}, with {', '.join(labels)}")
    return model


def sampling_options(generation_config: GenerationConfig) -> Mapping[str, Any]:
    """Return the sampling options of transformers: greedy decoding without a temperature."""
    return (
        {"do_sample": True, "temperature": generation_config.temperature}
        if generation_config.temperature
        else {"do_sample": False}
    )


def label_adapters(adapters: Sequence[PublishedAdapter]) -> dict[str, PublishedAdapter]:
    """Return adapters by the names of their jobs, with the start of the digest if a job has several."""
    if duplicates := [digest for digest, count in Counter(one.record.digest for one in adapters).items() if count > 1]:
        same = " and ".join(one.uri for one in adapters if one.record.digest == duplicates[0])
        raise RunError(Reason.INVALID_SPEC, f"{ADAPTER_FIELD}: {same} are the same adapter; give it once")
    jobs = Counter([BASE_LABEL, *(one.record.job for one in adapters)])
    return {
        one.record.job if jobs[one.record.job] == 1 else f"{one.record.job}/{one.record.digest[:_DIGEST_DIGITS]}": one
        for one in adapters
    }


def check_same_base(adapters: Mapping[str, PublishedAdapter], *, base_given: bool) -> None:
    """Raise RunError if the adapters need different bases: only one is loaded."""
    needs = {label: _describe_base(one, base_given=base_given) for label, one in adapters.items()}
    if len(set(needs.values())) > 1:
        listing = "; ".join(f"{label} needs {need}" for label, need in needs.items())
        raise RunError(
            Reason.INVALID_SPEC,
            f"{ADAPTER_FIELD}: only one base is loaded, but {listing}; load them separately",
        )


def _describe_base(published: PublishedAdapter, *, base_given: bool) -> str:
    record, bits = published.record, describe_bits(published.record.quantization)
    return f"a base in {bits}" if base_given else f"{record.base} at {record.commit[:12]} in {bits}"


def describe_bits(quantization: QuantizationSpec) -> str:
    """Return the quantization of a base in words; type and double quantization apply to 4 bits only."""
    if quantization.bits != 4:
        return f"{quantization.bits} bits"
    return f"4 bits ({quantization.type}{', double quantization' if quantization.double_quant else ''})"


def check_module_conflicts(adapters: Mapping[str, PublishedAdapter]) -> None:
    """Raise RunError if one adapter replaces a module that another one adapts: peft cannot load both."""
    modules = {label: _modules(one) for label, one in adapters.items()}
    for one, other in combinations(adapters, 2):
        for replacing, adapting in ((one, other), (other, one)):
            if both := sorted(modules[replacing].replaced & modules[adapting].adapted):
                raise RunError(
                    Reason.INVALID_SPEC,
                    f"{ADAPTER_FIELD}: {replacing} replaces {both[0]}, which {adapting} adapts, and peft cannot load "
                    "both; load them separately",
                )


@dataclass(frozen=True)
class _Modules:
    replaced: frozenset[str]
    adapted: frozenset[str]


def _modules(published: PublishedAdapter) -> _Modules:
    names = {name.removeprefix("base_model.model.") for name in read_shapes(published.folder)}
    lora_names = {name for name in names if ".lora_" in name}
    return _Modules(
        replaced=frozenset(name.rpartition(".")[0] for name in names - lora_names),
        adapted=frozenset(name.partition(".lora_")[0] for name in lora_names),
    )


def _load(adapters: Mapping[str, PublishedAdapter], folder: Path, device: DeviceName) -> MultiAdapterModel:
    """Load the base, quantized as in training, and every adapter on it."""
    hardware = observe_hardware(device)
    config = load_text_config(folder)
    dtype, _ = compute_dtype(hardware, config.model_type)
    attention, _ = choose_attention(attention_facts(config), hardware)
    keys = {label: f"adapter_{number:03}" for number, label in enumerate(adapters)}  # peft's names have no dots
    first, *others = adapters
    base = load_base(folder, adapters[first].record.quantization, dtype, attention, device)
    with reading_model(ADAPTER_FIELD, "PEFT cannot load the adapter"):
        peft = PeftModel.from_pretrained(base, adapters[first].folder, adapter_name=keys[first])
        for label in others:
            _add_adapter(peft, adapters[label].folder, keys[label])
    prompt_builders = {label: _make_prompt_builder(one) for label, one in adapters.items()}
    handles = tuple(AdapterHandle(label, prompt_builders[label], keys[label]) for label in adapters)
    loaded = TrainableModel(peft.eval(), peft.get_base_model(), base.device, dtype, plain_head=False)
    return MultiAdapterModel(loaded, (AdapterHandle(BASE_LABEL, prompt_builders[first]), *handles))


def _add_adapter(peft: Any, folder: Path, key: str) -> None:
    """Load one more adapter next to those already loaded."""
    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    # Once an adapter replaces the embedding, peft 0.21 no longer detects that the output layer is tied to it, and would
    # give a second such adapter the base's output layer.
    ties = [other.modules_to_tie for other in peft.peft_config.values() if other.ensure_weight_tying]
    if settings.ensure_weight_tying and ties:
        settings.ensure_weight_tying, settings.modules_to_tie = False, ties[0]
    peft.add_adapter(key, settings)
    peft.load_adapter(folder, adapter_name=key)


def _make_prompt_builder(published: PublishedAdapter) -> PromptBuilder:
    tokenizer = load_tokenizer(published.folder, field=ADAPTER_FIELD)
    return make_prompt_builder(published.record, tokenizer, ADAPTER_FIELD)
