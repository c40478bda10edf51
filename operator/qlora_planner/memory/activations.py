"""Memory of a forward and a backward pass beyond weights, gradients and optimizer state.

A model's operations are recorded as transformers, peft and the trainer run them (decoder.py, linear_layers.py), and
simulated forward and backward (autograd_tape.py). Layers are identical, so simulating a few is enough for all.
"""

from dataclasses import dataclass
from typing import Final

from qlora_planner.memory.autograd_tape import Segment, SimulatedMemory, Tensor, simulate
from qlora_planner.memory.decoder import Decoder
from qlora_planner.memory.forward_config import FP32, ForwardConfig
from qlora_planner.models.shapes import ModelShape, ModelWeights

LOGITS_PER_CHUNK: Final = 1 << 25
"""Logits that exist at once: qlora_trainer.model.loss.LOGITS_PER_CHUNK."""
_SIMULATED_LAYERS: Final = 3
"""Layers of each kind that are simulated: first, middle and last; each further one adds as much as the middle one."""


@dataclass(frozen=True)
class Activations:
    """Bytes of activations on the device."""

    saved: int
    """At the end of the forward pass: what is saved for backward."""
    peak: int
    """The maximum during forward and backward."""


def estimate_activations(shape: ModelShape, config: ForwardConfig) -> Activations:
    """Return the activations of one micro-batch, in bytes on one device."""
    sliding_layers = shape.attention.sliding_layers
    # If there are both kinds, the last layer is assumed to be a sliding one, which has a mask more often.
    kinds = {False: shape.layers - sliding_layers, True: sliding_layers}
    layers = [sliding for sliding, number in kinds.items() for _ in range(min(number, _SIMULATED_LAYERS))]
    simulated = _simulate(shape, config, layers)
    saved, peak = simulated.saved, simulated.peak
    for sliding, number in kinds.items():
        if number > _SIMULATED_LAYERS:
            fewer = _simulate(shape, config, _without_one(layers, sliding))
            saved += (number - _SIMULATED_LAYERS) * (simulated.saved - fewer.saved)
            peak += (number - _SIMULATED_LAYERS) * (simulated.peak - fewer.peak)
    return Activations(saved, peak)


def _without_one(layers: list[bool], sliding: bool) -> list[bool]:
    """Remove one layer of a kind, neither the first nor the last."""
    middle = layers.index(sliding) + 1
    return layers[:middle] + layers[middle + 1 :]


def _simulate(shape: ModelShape, config: ForwardConfig, layers: list[bool]) -> SimulatedMemory:
    decoder = Decoder(shape, config)
    segments = [decoder.embed()]
    for sliding in layers:
        segments.append(decoder.layer(segments[-1].output, sliding=sliding))
    segments.append(decoder.select_labeled(segments[-1].output))
    segments.append(_loss(decoder, segments[-1].output))
    return simulate(segments, recompute=[False, *[config.checkpointing] * len(layers), False, False])


def _loss(decoder: Decoder, chosen: Tensor) -> Segment:
    record = decoder.record
    if decoder.shape.plain_head:
        return record.end_segment(_chunked_loss(decoder, chosen))
    probabilities = record.softmax(chosen)
    loss = record.emit(1, FP32, [probabilities], [probabilities])
    record.keep_alive(chosen)
    return record.end_segment(loss)


def _chunked_loss(decoder: Decoder, states: Tensor) -> Tensor:
    """Record the trainer's chunked cross-entropy, which computes gradients while a chunk's logits exist."""
    config, record, weights = decoder.config, decoder.record, decoder.shape.head.weights
    head = record.cached_cast(decoder.layers.weight(weights), config.compute)
    # The gradient of the hidden states [labels, hidden], and of a trainable head [vocabulary, hidden] in fp32.
    gradients = [record.emit(states.elements, states.width)]
    gradients += [record.emit(weights, FP32)] if config.full_finetune else []
    record.emit(1, FP32, [states, head, *gradients], gradients)
    scaled = states.elements * FP32 * (2 if config.autocast else 1)  # in fp32, then times the loss's gradient
    return record.update_last(forward_workspace=_chunk_bytes(decoder.shape, config), backward_workspace=scaled)


def least_activations(shape: ModelWeights, config: ForwardConfig) -> Activations:
    """Return what the loss alone takes: a lower bound for a model whose layers are not known."""
    states = config.batch.labels * shape.head.inputs * config.compute
    return Activations(states, states + _chunk_bytes(shape, config))


def _chunk_bytes(shape: ModelWeights, config: ForwardConfig) -> int:
    """Return the peak bytes for one chunk of logits [positions, vocabulary]."""
    logits = min(max(LOGITS_PER_CHUNK // shape.vocabulary, 1), config.batch.labels) * shape.vocabulary
    # The product, its cast to fp32, and the log-softmax.
    forward = logits * ((config.compute if config.autocast else 0) + 2 * FP32)
    # The log-softmax, its gradient, and that of the logits.
    backward = logits * 3 * FP32
    return max(forward, backward, _head_gradient_bytes(shape, config, logits) if config.full_finetune else 0)


def _head_gradient_bytes(shape: ModelWeights, config: ForwardConfig, logits: int) -> int:
    """Return the peak bytes for a trainable head: its gradient next to that of the logits, then cast to fp32."""
    gradient = shape.head.weights * config.compute
    return max(gradient + logits * config.compute, gradient + shape.head.weights * FP32 if config.autocast else 0)
