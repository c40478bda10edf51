"""The quantized, frozen base model with its adapter, and the loss of a batch."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qlora_api.accelerators import DeviceName
from qlora_api.v1alpha1 import LoraSpec, QuantizationSpec
from qlora_trainer.data.batching import Batch
from qlora_trainer.model.adapter import adapter_disabled, initial_adapter_weights, make_peft_model
from qlora_trainer.model.hardware import torch_device
from qlora_trainer.model.loss import (
    Head,
    chunked_cross_entropy,
    chunked_statistics,
    positions_per_chunk,
    token_losses,
)
from qlora_trainer.model.model_files import check_model_files
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.model.unpacked_attention import use_unpacked_sdpa
from qlora_trainer.model.weight_check import check_loaded, check_weight_files, is_quantized, reading_model
from qlora_trainer.storage.store import MODEL_FIELD

_PACKING_TOLERANCE: Final = 0.05
"""Relative distance that 16-bit rounding explains; rows that attend to each other are far above (0.3 and more)."""


@dataclass(frozen=True)
class TrainableModel:
    """The model that is trained, and how its loss is computed."""

    wrapped: Any
    """A frozen base with a trainable adapter, or the model itself with method full."""
    model: Any
    """The transformers model inside `wrapped`, with the adapter's layers."""
    device: torch.device
    dtype: torch.dtype
    plain_head: bool
    """The logits are the output layer applied to the last hidden state, so they can be computed in chunks."""
    initial_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Initial adapter weights that were subtracted from the base (PiSSA); empty for other initializations."""

    @property
    def is_full_finetune(self) -> bool:
        """Return whether all weights of the model are trained."""
        return self.wrapped is self.model

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the trainable weights."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the trainable weights with their names."""
        return [(name, weight) for name, weight in self.wrapped.named_parameters() if weight.requires_grad]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return torch's autocast to the run's dtype: without it, fp32 adapters would upcast (double) every input."""
        return autocast_to(self.dtype, self.device)

    def loss_sum(self, batch: Batch, weight: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy of a batch's labels, times a scalar weight, in fp32."""
        with self.autocast():
            if self.plain_head:
                return chunked_cross_entropy(self._label_hidden_states(batch), batch.labels, self._head, weight)
            return token_losses(self._label_logits(batch), batch.labels).sum() * weight

    @torch.no_grad()
    def statistics(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of each label [labels], and whether it is the top-1 prediction [labels]."""
        with self.autocast():
            if self.plain_head:
                return chunked_statistics(self._label_hidden_states(batch), batch.labels, self._head)
            logits = self._label_logits(batch)
            return chunked_statistics(logits, batch.labels, Head(_identity, positions_per_chunk(logits.shape[-1])))

    @contextlib.contextmanager
    def evaluating(self, *, adapter: bool = True) -> Iterator[None]:
        """Switch to evaluation mode; afterwards mode, adapter and random state are as before.

        With method full, `adapter=False` is only meaningful before the first step, which changes the base.
        """
        was_training = self.wrapped.training
        devices = [] if self.device.type == "cpu" else [self.device]
        without = contextlib.nullcontext() if adapter else adapter_disabled(self.wrapped, self.initial_weights)
        with torch.random.fork_rng(devices=devices), torch.no_grad(), without:
            self.wrapped.eval()
            try:
                yield
            finally:
                self.wrapped.train(was_training)

    @property
    def _head(self) -> Head:
        output = self.model.get_output_embeddings()
        trainable = tuple(parameter for parameter in output.parameters() if parameter.requires_grad)
        # Not the shape of the weight: under ZeRO-3 a weight that is not gathered has none.
        return Head(output, positions_per_chunk(self.model.config.get_text_config().vocab_size), trainable)

    def _label_hidden_states(self, batch: Batch) -> torch.Tensor:
        states: torch.Tensor = self.model.base_model(**_inputs(batch)).last_hidden_state
        return states.flatten(0, 1)[batch.label_positions]

    def _label_logits(self, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = self.model(**_inputs(batch)).logits
        return logits.flatten(0, 1)[batch.label_positions]


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return torch's autocast to a dtype, disabled for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _identity(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _inputs(batch: Batch) -> dict[str, Any]:
    # A cache or a mask, even one of ones, disables the separation of packed rows (transformers#46634).
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    return inputs


def load_text_config(folder: Path) -> Any:
    """Return the configuration of the language model."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()


def load_base(
    folder: Path, quantization: QuantizationSpec, dtype: torch.dtype, attention: str, device: DeviceName
) -> Any:
    """Load the base from safetensors and quantize it while loading; code of its repository is never run.

    Raises:
        RunError: MODEL_UNSUPPORTED if weights are missing or have another shape, or transformers cannot read a file.

    """
    check_model_files(folder)
    check_weight_files(folder)
    with reading_model(MODEL_FIELD.field):
        # Weights that are stored quantized are loaded by the configuration that they were stored with.
        stored = is_quantized(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        quantizer = {} if stored else {"quantization_config": quantization_config(quantization, dtype)}
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            device_map={"": torch_device(device)},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **quantizer,
        )
    check_loaded(found)
    disable_weight_repacking(model)
    use_unpacked_sdpa(model)
    # prepare_model_for_kbit_training would cast embeddings and output layer to fp32: gigabytes, no gain (peft#816).
    model.requires_grad_(False)
    return model


def quantization_config(quantization: QuantizationSpec, dtype: torch.dtype) -> Any:
    """Return the configuration of bitsandbytes, or None for a 16-bit base."""
    if quantization.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization.bits == 8 else None


def disable_weight_repacking(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU.

    The repacking is never undone and has no gradient for its input, so every later training step would be wrong.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def attach_lora(base: Any, lora: LoraSpec, seed: int, settings: RuntimeSettings) -> TrainableModel:
    """Return the base with a new adapter."""
    plain = head_is_plain(base)
    if settings.gradient_checkpointing:
        _enable_gradient_checkpointing(base)
    peft = make_peft_model(base, lora, seed)
    initial_weights = initial_adapter_weights(peft, lora)
    return TrainableModel(peft, peft.get_base_model(), base.device, settings.dtype, plain, initial_weights)


def prepare_full_finetune(base: Any, settings: RuntimeSettings) -> TrainableModel:
    """Return the base with all its weights trainable."""
    with autocast_to(settings.dtype, base.device):
        plain = head_is_plain(base)
    if settings.gradient_checkpointing:
        _enable_gradient_checkpointing(base)
    base.requires_grad_(True)
    return TrainableModel(base, base, base.device, settings.dtype, plain)


def _enable_gradient_checkpointing(base: Any) -> None:
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()


@torch.no_grad()
def head_is_plain(base: Any) -> bool:
    """Return whether the output layer alone produces the logits; Gemma 2 caps them, Granite and Cohere scale them."""
    ids = _some_tokens(base, 8)
    states = base.base_model(input_ids=ids, use_cache=False)
    head = base.get_output_embeddings()
    if head is None or not hasattr(states, "last_hidden_state"):
        return False
    return relative_distance(head(states.last_hidden_state), base(input_ids=ids, use_cache=False).logits) < 1e-3


def packing_is_exact(base: Any) -> bool:
    """Return whether packed rows have the same logits as separate ones; recurrent layers leak state, for example."""
    first, second = _some_tokens(base, 7), _some_tokens(base, 5, start=11)
    ids = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(base.device)[None]
    with _recorded_embeddings(base) as embeddings:
        packed = base(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 7:]
    if _depends_on_earlier(packed, embeddings, 7):
        return False
    with torch.no_grad():
        separate = base(input_ids=second, use_cache=False).logits[0]
        return relative_distance(packed, separate) < _PACKING_TOLERANCE


@contextlib.contextmanager
def _recorded_embeddings(base: Any) -> Iterator[list[torch.Tensor]]:
    """Record what the embedding returns [rows, tokens, width], as leaves of the graph of gradients."""
    embeddings: list[torch.Tensor] = []

    def record(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    hook = base.get_input_embeddings().register_forward_hook(record)
    try:
        yield embeddings
    finally:
        hook.remove()


def _depends_on_earlier(logits: torch.Tensor, embeddings: Sequence[torch.Tensor], start: int) -> bool:
    """Return whether a gradient of the logits reaches an embedding before a token; masked attention has exactly none.

    A distance would need a tolerance, and models whose attention is nearly uniform leak less than 16 bits round.
    """
    if not embeddings or not logits.requires_grad:
        return True  # the model has embeddings of another kind
    gradients = torch.autograd.grad(logits.float().square().sum(), embeddings, allow_unused=True)
    return any(gradient is None or bool(gradient[:, :start].any()) for gradient in gradients)


def relative_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return |one - other| / |other|."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12))


def _some_tokens(base: Any, count: int, start: int = 1) -> torch.Tensor:
    """Return arbitrary, different token ids [1, count]."""
    vocabulary = base.get_input_embeddings().weight.shape[0]
    tokens: torch.Tensor = (torch.arange(count) * 37 + start) % vocabulary
    return tokens[None].to(base.device)
