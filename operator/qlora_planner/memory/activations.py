"""Memory of a forward and a backward pass beyond weights, gradients and optimizer state.

A model's operations are written down as transformers, peft and the trainer run them (decoder.py, linears.py), and
played forward and backward (tape.py). Layers are equal, so that few of them tell what all of them take.
"""

from dataclasses import dataclass
from typing import Final

from qlora_planner.memory.autograd_tape import Segment, SimulatedMemory, Tensor, simulate
from qlora_planner.memory.decoder import Decoder
from qlora_planner.memory.forward_config import FP32, ForwardConfig
from qlora_planner.models.shapes import ModelShape

LOGITS_PER_CHUNK: Final = 1 << 25
"""Logits alive at once: qlora_trainer.model.loss.LOGITS_PER_CHUNK."""
_SIMULATED_LAYERS: Final = 3
"""Layers of a kind that are played: first, middle and last; each further one adds what the middle one adds."""


@dataclass(frozen=True)
class Activations:
    """Bytes on the device."""

    saved: int
    """At the end of the forward pass: what backward waits for."""
    peak: int
    """The most at any time of forward and backward."""


def estimate_activations(shape: ModelShape, config: ForwardConfig) -> Activations:
    """Return what one micro-batch takes beside weights, gradients and optimizer state."""
    slide = shape.attention.sliding_layers
    # Where both kinds are there, the last layer is taken as one that slides, which has a mask more often.
    kinds = {False: shape.layers - slide, True: slide}
    layers = [sliding for sliding, number in kinds.items() for _ in range(min(number, _SIMULATED_LAYERS))]
    played = _simulate(shape, config, layers)
    kept, peak = played.saved, played.peak
    for sliding, number in kinds.items():
        if number > _SIMULATED_LAYERS:
            fewer = _simulate(shape, config, _without_one(layers, sliding))
            kept += (number - _SIMULATED_LAYERS) * (played.saved - fewer.saved)
            peak += (number - _SIMULATED_LAYERS) * (played.peak - fewer.peak)
    return Activations(kept, peak)


def _without_one(layers: list[bool], sliding: bool) -> list[bool]:
    """Leave out one layer of a kind, neither the first nor the last."""
    middle = layers.index(sliding) + 1
    return layers[:middle] + layers[middle + 1 :]


def _simulate(shape: ModelShape, setting: ForwardConfig, layers: list[bool]) -> SimulatedMemory:
    decoder = Decoder(shape, setting)
    segments = [decoder.embed()]
    for sliding in layers:
        segments.append(decoder.layer(segments[-1].output, sliding=sliding))
    segments.append(decoder.select_labeled(segments[-1].output))
    segments.append(_loss(decoder, segments[-1].output))
    return simulate(segments, recompute=[False, *[setting.checkpointing] * len(layers), False, False])


def _loss(decoder: Decoder, chosen: Tensor) -> Segment:
    record = decoder.record
    if decoder.shape.plain_head:
        return record.end_segment(_chunked_loss(decoder, chosen))
    shares = record.softmax(chosen)
    loss = record.emit(1, FP32, [shares], [shares])
    record.keep_alive(chosen)
    return record.end_segment(loss)


def _chunked_loss(decoder: Decoder, states: Tensor) -> Tensor:
    """Write down the trainer's chunked cross-entropy, which takes gradients while a chunk's logits are there."""
    setting, record, weights = decoder.config, decoder.record, decoder.shape.head.weights
    head = record.cached_cast(decoder.layers.weight(weights), setting.compute)
    # The gradient of the hidden states [labels, hidden], and of a head that learns [vocabulary, hidden] in fp32.
    gradients = [record.emit(states.elements, states.width)]
    gradients += [record.emit(weights, FP32)] if setting.full_finetune else []
    record.emit(1, FP32, [states, head, *gradients], gradients)
    scaled = states.elements * FP32 * (2 if setting.autocast else 1)  # in fp32, then times the loss's gradient
    return record.update_last(forward_workspace=_chunk_bytes(decoder.shape, setting), backward_workspace=scaled)


def _chunk_bytes(shape: ModelShape, setting: ForwardConfig) -> int:
    """Return what one chunk of logits [positions, vocabulary] takes at most."""
    logits = min(max(LOGITS_PER_CHUNK // shape.vocabulary, 1), setting.batch.labels) * shape.vocabulary
    # As they are multiplied, cast to fp32, and their log-softmax.
    forward = logits * ((setting.compute if setting.autocast else 0) + 2 * FP32)
    # Their log-softmax, its gradient, and theirs.
    backward = logits * 3 * FP32
    return max(forward, backward, _head_gradient_bytes(shape, setting, logits) if setting.full_finetune else 0)


def _head_gradient_bytes(shape: ModelShape, setting: ForwardConfig, logits: int) -> int:
    """Return what a head that learns takes at most: its gradient beside that of the logits, then cast to fp32."""
    multiplied = shape.head.weights * setting.compute
    return max(multiplied + logits * setting.compute, multiplied + shape.head.weights * FP32 if setting.autocast else 0)
