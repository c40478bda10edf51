"""Follows the bytes of a forward and a backward pass the way autograd keeps and frees them; knows no model.

A model is written down as the operations that it runs, on tensors that have a size and no content. Played forward,
every tensor is taken when it is made and given back when nothing needs it any more; played backward, gradients are
taken and what was saved is given back. The peak is the most at any time.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Tensor:
    """A size; no two are equal."""

    elements: int
    width: int
    """Bytes per element."""
    learns: bool = False
    """Backward computes its gradient."""
    lasting: bool = False
    """It is there before and after, as a weight is, and is counted elsewhere."""
    source: "Tensor | None" = None
    """Whose memory it shares, if it is a view."""

    @property
    def bytes(self) -> int:
        """Return what it takes if it is no view."""
        return self.elements * self.width

    @property
    def memory(self) -> "Tensor":
        """Return the tensor that owns the memory."""
        return self if self.source is None else self.source.memory


@dataclass(frozen=True, eq=False)
class Operation:
    """One node of autograd's graph."""

    output: Tensor
    inputs: tuple[Tensor, ...]
    saved: tuple[Tensor, ...] = ()
    """What its backward needs."""
    clung: tuple[Tensor, ...] = ()
    """What its node holds by itself: a checkpoint does not let it go, and it stays as long as the graph."""
    passes: tuple[Tensor, ...] = ()
    """Inputs whose gradient is the gradient of its output, not new memory."""
    forward_work: int = 0
    """Bytes that it takes beside its output while it runs."""
    backward_work: int = 0


@dataclass(frozen=True)
class Segment:
    """Operations that are recomputed together, if activations are."""

    operations: tuple[Operation, ...]
    output: Tensor
    shared: tuple[Tensor, ...] = ()
    """What is held until the last segment beside its output: masks, tables. Checkpoints hold it for good."""
    lasting: tuple[Tensor, ...] = ()
    """What of it is held until the end of the pass."""
    cached: tuple[Tensor, ...] = ()
    """Casts of weights, which autocast holds until the end of the forward pass, or of the recomputation."""

    @property
    def left(self) -> tuple[Tensor, ...]:
        """Return what is there when it has run."""
        return (self.output, *self.shared, *self.cached)


@dataclass
class Memory:
    """Who holds which tensor; it is taken with its first holder and given back with its last."""

    now: int = 0
    peak: int = 0
    holders: Counter[Tensor] = field(default_factory=Counter)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Add a holder to each."""
        for tensor in tensors:
            owner = tensor.memory
            if not owner.lasting:
                self.now += 0 if self.holders[owner] else owner.bytes
                self.holders[owner] += 1
        self.peak = max(self.peak, self.now)

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Take a holder away from each."""
        for tensor in tensors:
            owner = tensor.memory
            if not owner.lasting:
                self.holders[owner] -= 1
                self.now -= 0 if self.holders[owner] else owner.bytes

    def touch(self, size: int) -> None:
        """Take some bytes and give them back at once."""
        self.peak = max(self.peak, self.now + size)


def play_forward(
    operations: Sequence[Operation],
    memory: Memory,
    *,
    leaves: Sequence[Tensor] = (),
    keeps: bool,
    until: int | None = None,
) -> None:
    """Run operations and leave some tensors behind, and if they keep, what backward needs.

    Every other tensor goes with the last operation that reads it; all go where the run is broken off.
    """
    last = {tensor.memory: number for number, step in enumerate(operations) for tensor in step.inputs}
    last |= {tensor.memory: len(operations) for tensor in leaves}
    made: set[Tensor] = set()
    for number, step in enumerate(operations[:until]):
        if step.output.memory not in made:
            made.add(step.output.memory)
            memory.hold([step.output])
        memory.touch(step.forward_work)
        if keeps and step.output.learns:
            memory.hold(step.saved)
            memory.hold(step.clung)
        gone = {tensor.memory for tensor in (*step.inputs, step.output) if last.get(tensor.memory, -1) <= number}
        memory.drop(gone & made)
        made -= gone
    memory.drop(made - {tensor.memory for tensor in leaves})


def play_backward(operations: Sequence[Operation], memory: Memory, gradients: dict[Tensor, Tensor]) -> None:
    """Run backward; gradients of results come in, those of inputs go out, all of them held."""
    for step in reversed(operations):
        gradient = gradients.pop(step.output, None)
        made = _gradients_of_inputs(step, gradient)
        memory.hold(each for _, each in made)
        memory.touch(step.backward_work if gradient else 0)
        if step.output.learns:
            memory.drop(step.saved)
        if gradient:
            memory.drop([gradient])
        for tensor, each in made:
            _accumulate(tensor, each, memory, gradients)


def _gradients_of_inputs(step: Operation, gradient: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if gradient is None:
        return []
    learning = [tensor for tensor in step.inputs if tensor.learns]
    return [
        (tensor, gradient if tensor in step.passes else Tensor(tensor.elements, tensor.width)) for tensor in learning
    ]


def _accumulate(tensor: Tensor, gradient: Tensor, memory: Memory, gradients: dict[Tensor, Tensor]) -> None:
    """Add a gradient to what is there: in place if nobody else holds that, as the engine's input buffers do."""
    known = gradients.get(tensor)
    if tensor.lasting:  # a parameter's is added to its .grad, which is there already
        memory.drop([gradient])
    elif known is None:
        gradients[tensor] = gradient
    elif memory.holders[known.memory] == 1:
        memory.drop([gradient])
    else:
        gradients[tensor] = Tensor(tensor.elements, tensor.width)
        memory.hold([gradients[tensor]])
        memory.drop([known, gradient])


@dataclass(frozen=True)
class Played:
    """Bytes of one forward and backward pass."""

    kept: int
    """At the end of forward: what backward waits for."""
    peak: int


def play(segments: Sequence[Segment], *, recompute: Sequence[bool]) -> Played:
    """Run segments forward, one after the other, and backward; those to recompute keep what they read only."""
    memory = Memory()
    _all_forward(segments, recompute, memory)
    kept = memory.now
    loss = segments[-1].output
    gradients = {loss: Tensor(loss.elements, loss.width)}
    memory.hold(gradients.values())
    for number in reversed(range(len(segments))):
        if recompute[number]:
            _backward_again(segments[number], memory, gradients)
            memory.drop([segments[number - 1].output])  # the checkpoint's input
        else:
            play_backward(segments[number].operations, memory, gradients)
    return Played(kept, memory.peak)


def _all_forward(segments: Sequence[Segment], recompute: Sequence[bool], memory: Memory) -> None:
    for number, segment in enumerate(segments):
        if number == len(segments) - 1 and not any(recompute):
            memory.drop(tensor for segment in segments for tensor in segment.shared if tensor not in segment.lasting)
        play_forward(segment.operations, memory, leaves=segment.left, keeps=not recompute[number])
        if recompute[number]:
            memory.hold(_left_by_checkpoint(segment))
        elif number:
            memory.drop([segments[number - 1].output])
    memory.drop(tensor for segment in segments for tensor in segment.cached)


def _left_by_checkpoint(segment: Segment) -> list[Tensor]:
    """Return what nodes hold by themselves; recomputed tensors are others, so that these are stand-ins."""
    clung = {tensor.memory for step in segment.operations if step.output.learns for tensor in step.clung}
    return [Tensor(tensor.elements, tensor.width) for tensor in clung]


def _backward_again(segment: Segment, memory: Memory, gradients: dict[Tensor, Tensor]) -> None:
    """Run backward to where something saved is needed, then forward again until all of that is there, then go on."""
    last = max((number for number, step in enumerate(segment.operations) if step.saved), default=-1) + 1
    play_backward(segment.operations[last:], memory, gradients)
    play_forward(segment.operations, memory, leaves=segment.cached, keeps=True, until=last)
    memory.drop(segment.cached)
    memory.drop(tensor for step in segment.operations[:last] if step.output.learns for tensor in step.clung)
    play_backward(segment.operations[:last], memory, gradients)
