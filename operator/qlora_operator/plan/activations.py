"""Memory of a forward and a backward pass beyond weights, gradients and optimizer state.

A model's operations are written down as transformers, peft and the trainer run them (decoder.py, linears.py), and
played forward and backward (tape.py). Layers are equal, so that few of them tell what all of them take.
"""

from dataclasses import dataclass
from typing import Final

from qlora_operator.plan.decoder import Decoder
from qlora_operator.plan.setting import FP32, Setting
from qlora_operator.plan.shapes import ModelShape
from qlora_operator.plan.tape import Played, Segment, Tensor, play

LOGITS_PER_CHUNK: Final = 1 << 25
"""Logits alive at once: qlora_trainer.loss.LOGITS_PER_CHUNK."""
_PLAYED_LAYERS: Final = 3
"""First, middle and last: each further one adds what the middle one adds."""


@dataclass(frozen=True)
class Activations:
    """Bytes on the device."""

    kept: int
    """At the end of the forward pass: what backward waits for."""
    peak: int
    """The most at any time of forward and backward."""


def estimate_activations(shape: ModelShape, setting: Setting) -> Activations:
    """Return what one micro-batch takes beside weights, gradients and optimizer state."""
    few = min(shape.layers, _PLAYED_LAYERS)
    last = _play(shape, setting, few)
    if few == shape.layers:
        return Activations(last.kept, last.peak)
    before = _play(shape, setting, few - 1)
    more = shape.layers - few
    return Activations(
        kept=last.kept + more * (last.kept - before.kept),
        peak=last.peak + more * (last.peak - before.peak),
    )


def _play(shape: ModelShape, setting: Setting, layers: int) -> Played:
    decoder = Decoder(shape, setting)
    segments = [decoder.embed()]
    for _ in range(layers):
        segments.append(decoder.layer(segments[-1].output))
    segments.append(decoder.choose(segments[-1].output))
    segments.append(_loss(decoder, segments[-1].output))
    return play(segments, recompute=[False, *[setting.checkpointing] * layers, False, False])


def _loss(decoder: Decoder, chosen: Tensor) -> Segment:
    record = decoder.record
    if decoder.shape.plain_head:
        return record.cut(_chunked_loss(decoder, chosen))
    shares = record.softmax(chosen)
    loss = record.made(1, FP32, [shares], [shares])
    record.until_here(chosen)
    return record.cut(loss)


def _chunked_loss(decoder: Decoder, states: Tensor) -> Tensor:
    """Write down the trainer's chunked cross-entropy, which takes gradients while a chunk's logits are there."""
    setting, record, weights = decoder.setting, decoder.record, decoder.shape.head.weights
    head = record.cached_cast(decoder.layers.weight(weights), setting.compute)
    # The gradient of the hidden states [labels, hidden], and of a head that learns [vocabulary, hidden] in fp32.
    gradients = [record.made(states.elements, states.width)]
    gradients += [record.made(weights, FP32)] if setting.whole else []
    record.made(1, FP32, [states, head, *gradients], gradients)
    scaled = states.elements * FP32 * (2 if setting.autocast else 1)  # in fp32, then times the loss's gradient
    return record.amend(forward_work=_chunk_bytes(decoder.shape, setting), backward_work=scaled)


def _chunk_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return what one chunk of logits [positions, vocabulary] takes at most."""
    logits = min(max(LOGITS_PER_CHUNK // shape.vocabulary, 1), setting.lines.labels) * shape.vocabulary
    # As they are multiplied, cast to fp32, and their log-softmax.
    forward = logits * ((setting.compute if setting.autocast else 0) + 2 * FP32)
    # Their log-softmax, its gradient, and theirs.
    backward = logits * 3 * FP32
    # Their gradient as they are multiplied, and that of a head that learns as it is multiplied and in fp32.
    learned = logits * setting.compute + shape.head.weights * (setting.compute + FP32) if setting.whole else 0
    return max(forward, backward, learned)
