"""One base in memory and several adapters on it, all asked the same questions."""

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
from qlora_api.local_requests import Exchange, Manner, PanelRequest, Reply
from qlora_api.names import Reason
from qlora_api.v1alpha1 import QuantizationSpec
from qlora_trainer.data.rows import Message
from qlora_trainer.errors import RunError
from qlora_trainer.evaluation.generation import Answer, answer_prompts
from qlora_trainer.inference.compatibility import check_fits
from qlora_trainer.inference.prompts import Asker, make_asker
from qlora_trainer.inference.published_adapter import Published, fetch_base, open_adapter
from qlora_trainer.inference.vllm_limits import read_shapes
from qlora_trainer.model.architecture import load_tokenizer
from qlora_trainer.model.attention import attention_facts, choose_attention
from qlora_trainer.model.base_model import Tuned, load_base, load_text_config
from qlora_trainer.model.hardware import observe_hardware
from qlora_trainer.model.runtime_settings import compute_dtype
from qlora_trainer.observability.progress import Note, silent
from qlora_trainer.storage.snapshots import Places

ADAPTER_FIELD: Final = "--adapter"
BASE: Final = "base"
"""The label of the model without any adapter."""
_DIGEST_DIGITS: Final = 8
"""Of a result's digest, to tell two results of one job apart."""


@dataclass(frozen=True)
class Speaker:
    """The base or an adapter, and how it is asked."""

    label: str
    asker: Asker
    key: str | None = None
    """The adapter's name in peft; None is the base."""

    @property
    def follows(self) -> bool:
        """Return whether it can take earlier questions and answers into account."""
        return self.asker.chat is not None


@dataclass(frozen=True)
class Panel:
    """A loaded base with its adapters."""

    tuned: Tuned
    speakers: tuple[Speaker, ...]

    def start(self, manner: Manner, *, keeps: bool) -> "Conversation":
        """Return a conversation in which nothing was said, or refuse a manner that none of them has."""
        if manner.system and not any(speaker.follows for speaker in self.speakers):
            raise RunError(
                Reason.INVALID_SPEC,
                "--system: none of the adapters was trained on chats, which alone have a system message; leave it out",
            )
        return Conversation(self, manner, keeps)

    def answer(self, speaker: Speaker, messages: Sequence[Message], manner: Manner) -> Answer:
        """Return what one of them says to the last message."""
        prompt = speaker.asker.ask(messages)
        self._check_length(len(prompt) + manner.longest)
        torch.manual_seed(manner.seed)
        with self._speaking(speaker), torch.no_grad():
            tokenizer = speaker.asker.tokenizer
            return answer_prompts(self.tuned, [prompt], tokenizer, manner.longest, choice_of(manner))[0]

    @contextlib.contextmanager
    def _speaking(self, speaker: Speaker) -> Iterator[None]:
        if speaker.key is None:
            with self.tuned.peft.disable_adapter():
                yield
        else:
            self.tuned.peft.set_adapter(speaker.key, inference_mode=True)
            yield

    def _check_length(self, tokens: int) -> None:
        longest = getattr(self.tuned.causal.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and tokens > longest:
            raise RunError(
                Reason.INVALID_SPEC,
                f"the question: with what was said before and --max-tokens it takes {tokens} tokens, and the model "
                f"{longest} at most; ask for less, or begin anew",
            )


@dataclass
class Conversation:
    """Questions to all, and what each of them said before."""

    panel: Panel
    manner: Manner
    keeps: bool
    """Later questions build on earlier ones, with those that can follow."""
    _said: dict[str, list[Message]] = field(default_factory=dict)

    def ask(self, question: str, note: Note = silent) -> Exchange:
        """Let all answer, one after the other; note is told who is next."""
        replies = []
        for speaker in self.panel.speakers:
            note(speaker.label)
            replies.append(self._reply(speaker, question))
        return Exchange(question=question, replies=tuple(replies))

    def begin_anew(self) -> None:
        """Forget what was said."""
        self._said.clear()

    def _reply(self, speaker: Speaker, question: str) -> Reply:
        opening: list[Message] = [{"role": "system", "content": self.manner.system}] if self.manner.system else []
        messages = [*self._said.get(speaker.label, opening), {"role": "user", "content": question}]
        answer = self.panel.answer(speaker, messages, self.manner)
        if self.keeps and speaker.follows:
            self._said[speaker.label] = [*messages, {"role": "assistant", "content": answer.text}]
        return Reply(by=speaker.label, text=answer.text, complete=answer.complete)


def open_panel(request: PanelRequest, places: Places, work: Path, note: Note = silent) -> Panel:
    """Bring adapters and base onto this computer, prove that they belong together, and load them."""
    adapters = [open_adapter(places, uri, ADAPTER_FIELD, work) for uri in request.adapters]
    labels = label_adapters(adapters)
    check_agreement(labels, base_given=request.model is not None)
    check_apart(labels)
    folder = fetch_base(places, adapters[0].record, request.model, work)
    for published in adapters:
        check_fits(published, folder, "--base-model" if request.model else "the adapter's base")
    panel = _load(labels, folder, request.device)
    record = adapters[0].record
    note(f"{request.model or record.base} in {describe_bits(record.quantization)}, with {', '.join(labels)}")
    return panel


def choice_of(manner: Manner) -> Mapping[str, Any]:
    """Return how transformers chooses among the next tokens."""
    return {"do_sample": True, "temperature": manner.temperature} if manner.temperature else {"do_sample": False}


def label_adapters(adapters: Sequence[Published]) -> dict[str, Published]:
    """Return adapters by the names of their jobs, with the start of the digest where a job has several."""
    if twice := [digest for digest, times in Counter(one.record.digest for one in adapters).items() if times > 1]:
        same = " and ".join(one.uri for one in adapters if one.record.digest == twice[0])
        raise RunError(Reason.INVALID_SPEC, f"{ADAPTER_FIELD}: {same} are one adapter; give it once")
    jobs = Counter([BASE, *(one.record.job for one in adapters)])
    return {
        one.record.job if jobs[one.record.job] == 1 else f"{one.record.job}/{one.record.digest[:_DIGEST_DIGITS]}": one
        for one in adapters
    }


def check_agreement(adapters: Mapping[str, Published], *, base_given: bool) -> None:
    """Refuse adapters that need different bases: one is loaded."""
    needs = {label: _describe_base(one, base_given=base_given) for label, one in adapters.items()}
    if len(set(needs.values())) > 1:
        listing = "; ".join(f"{label} needs {need}" for label, need in needs.items())
        raise RunError(
            Reason.INVALID_SPEC,
            f"{ADAPTER_FIELD}: one base is loaded, and {listing}; ask those apart that differ",
        )


def _describe_base(published: Published, *, base_given: bool) -> str:
    record, bits = published.record, describe_bits(published.record.quantization)
    return f"a base in {bits}" if base_given else f"{record.base} at {record.commit[:12]} in {bits}"


def describe_bits(quantization: QuantizationSpec) -> str:
    """Return how a base is stored, in words; what only 4 bits have is left out for others."""
    if quantization.bits != 4:
        return f"{quantization.bits} bits"
    return f"4 bits ({quantization.type}{', double quantisation' if quantization.double_quant else ''})"


def check_apart(adapters: Mapping[str, Published]) -> None:
    """Refuse what peft cannot hold at once: a module that is replaced whole by one adapter and changed by another."""
    parts = {label: _modules(one) for label, one in adapters.items()}
    for one, other in combinations(adapters, 2):
        for whole, changing in ((one, other), (other, one)):
            if both := sorted(parts[whole].whole & parts[changing].changed):
                raise RunError(
                    Reason.INVALID_SPEC,
                    f"{ADAPTER_FIELD}: {whole} has a {both[0]} of its own, which {changing} changes, and peft cannot "
                    "hold both; ask them apart",
                )


@dataclass(frozen=True)
class _Modules:
    whole: frozenset[str]
    changed: frozenset[str]


def _modules(published: Published) -> _Modules:
    names = {name.removeprefix("base_model.model.") for name in read_shapes(published.folder)}
    changed = {name for name in names if ".lora_" in name}
    return _Modules(
        whole=frozenset(name.rpartition(".")[0] for name in names - changed),
        changed=frozenset(name.partition(".lora_")[0] for name in changed),
    )


def _load(adapters: Mapping[str, Published], folder: Path, device: DeviceName) -> Panel:
    """Load the base as it was trained on, and every adapter on it."""
    hardware = observe_hardware(device)
    dtype, _ = compute_dtype(hardware)
    attention, _ = choose_attention(attention_facts(load_text_config(folder)), hardware)
    keys = {label: f"adapter_{number:03}" for number, label in enumerate(adapters)}  # peft's names have no dots
    first, *others = adapters
    base = load_base(folder, adapters[first].record.quantization, dtype, attention, device)
    peft = PeftModel.from_pretrained(base, adapters[first].folder, adapter_name=keys[first])
    for label in others:
        _add_adapter(peft, adapters[label].folder, keys[label])
    askers = {label: _make_asker(one) for label, one in adapters.items()}
    speakers = tuple(Speaker(label, askers[label], keys[label]) for label in adapters)
    tuned = Tuned(peft.eval(), peft.get_base_model(), base.device, dtype, plain_head=False)
    return Panel(tuned, (Speaker(BASE, askers[first]), *speakers))


def _add_adapter(peft: Any, folder: Path, key: str) -> None:
    """Load one more adapter beside those that are there."""
    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    # Once an adapter has an embedding of its own, peft 0.21 no longer sees that the output layer shares its weight, and
    # would give a second one the base's output layer.
    ties = [other.modules_to_tie for other in peft.peft_config.values() if other.ensure_weight_tying]
    if settings.ensure_weight_tying and ties:
        settings.ensure_weight_tying, settings.modules_to_tie = False, ties[0]
    peft.add_adapter(key, settings)
    peft.load_adapter(folder, adapter_name=key)


def _make_asker(published: Published) -> Asker:
    return make_asker(published.record, load_tokenizer(published.folder, field=ADAPTER_FIELD))
