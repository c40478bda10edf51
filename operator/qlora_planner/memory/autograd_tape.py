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
    requires_grad: bool = False
    """Backward computes its gradient."""
    persistent: bool = False
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
    held_by_node: tuple[Tensor, ...] = ()
    """What its node holds by itself: a checkpoint does not let it go, and it stays as long as the graph."""
    grad_aliases: tuple[Tensor, ...] = ()
    """Inputs whose gradient is the gradient of its output, not new memory."""
    forward_workspace: int = 0
    """Bytes that it takes beside its output while it runs."""
    backward_workspace: int = 0


@dataclass(frozen=True)
class Segment:
    """Operations that are recomputed together, if activations are."""

    operations: tuple[Operation, ...]
    output: Tensor
    shared: tuple[Tensor, ...] = ()
    """What is held until the last segment beside its output: masks, tables. Checkpoints hold it for good."""
    held_through_forward: tuple[Tensor, ...] = ()
    """What of it is held until the end of the pass."""
    cached: tuple[Tensor, ...] = ()
    """Casts of weights, which autocast holds until the end of the forward pass, or of the recomputation."""

    @property
    def live_after(self) -> tuple[Tensor, ...]:
        """Return what is there when it has run."""
        return (self.output, *self.shared, *self.cached)


@dataclass
class MemoryTracker:
    """Who holds which tensor; it is taken with its first holder and given back with its last."""

    now: int = 0
    peak: int = 0
    holders: Counter[Tensor] = field(default_factory=Counter)

    def retain(self, tensors: Iterable[Tensor]) -> None:
        """Add a holder to each."""
        for tensor in tensors:
            owner = tensor.memory
            if not owner.persistent:
                self.now += 0 if self.holders[owner] else owner.bytes
                self.holders[owner] += 1
        self.peak = max(self.peak, self.now)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Take a holder away from each."""
        for tensor in tensors:
            owner = tensor.memory
            if not owner.persistent:
                self.holders[owner] -= 1
                self.now -= 0 if self.holders[owner] else owner.bytes

    def allocate_briefly(self, size: int) -> None:
        """Take some bytes and give them back at once."""
        self.peak = max(self.peak, self.now + size)


def simulate_forward(
    operations: Sequence[Operation],
    memory: MemoryTracker,
    *,
    live_out: Sequence[Tensor] = (),
    saves: bool,
    until: int | None = None,
) -> None:
    """Run operations and leave some tensors behind, and if they keep, what backward needs.

    Every other tensor goes with the last operation that reads it; all go where the run is broken off.
    """
    last = {tensor.memory: number for number, step in enumerate(operations) for tensor in step.inputs}
    last |= {tensor.memory: len(operations) for tensor in live_out}
    made: set[Tensor] = set()
    for number, step in enumerate(operations[:until]):
        if step.output.memory not in made:
            made.add(step.output.memory)
            memory.retain([step.output])
        memory.allocate_briefly(step.forward_workspace)
        if saves and step.output.requires_grad:
            memory.retain(step.saved)
            memory.retain(step.held_by_node)
        gone = {tensor.memory for tensor in (*step.inputs, step.output) if last.get(tensor.memory, -1) <= number}
        memory.release(gone & made)
        made -= gone
    memory.release(made - {tensor.memory for tensor in live_out})


def simulate_backward(operations: Sequence[Operation], memory: MemoryTracker, gradients: dict[Tensor, Tensor]) -> None:
    """Run backward; gradients of results come in, those of inputs go out, all of them held."""
    for step in reversed(operations):
        gradient = gradients.pop(step.output, None)
        made = _gradients_of_inputs(step, gradient)
        memory.retain(each for _, each in made)
        memory.allocate_briefly(step.backward_workspace if gradient else 0)
        if step.output.requires_grad:
            memory.release(step.saved)
        if gradient:
            memory.release([gradient])
        for tensor, each in made:
            _accumulate(tensor, each, memory, gradients)


def _gradients_of_inputs(step: Operation, gradient: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if gradient is None:
        return []
    learning = [tensor for tensor in step.inputs if tensor.requires_grad]
    return [
        (tensor, gradient if tensor in step.grad_aliases else Tensor(tensor.elements, tensor.width))
        for tensor in learning
    ]


def _accumulate(tensor: Tensor, gradient: Tensor, memory: MemoryTracker, gradients: dict[Tensor, Tensor]) -> None:
    """Add a gradient to what is there: in place if nobody else holds that, as the engine's input buffers do."""
    known = gradients.get(tensor)
    if tensor.persistent:  # a parameter's is added to its .grad, which is there already
        memory.release([gradient])
    elif known is None:
        gradients[tensor] = gradient
    elif memory.holders[known.memory] == 1:
        memory.release([gradient])
    else:
        gradients[tensor] = Tensor(tensor.elements, tensor.width)
        memory.retain([gradients[tensor]])
        memory.release([known, gradient])


@dataclass(frozen=True)
class SimulatedMemory:
    """Bytes of one forward and backward pass."""

    saved: int
    """At the end of forward: what backward waits for."""
    peak: int


def simulate(segments: Sequence[Segment], *, recompute: Sequence[bool]) -> SimulatedMemory:
    """Run segments forward, one after the other, and backward; those to recompute keep what they read only."""
    memory = MemoryTracker()
    _simulate_all_forward(segments, recompute, memory)
    kept = memory.now
    loss = segments[-1].output
    gradients = {loss: Tensor(loss.elements, loss.width)}
    memory.retain(gradients.values())
    for number in reversed(range(len(segments))):
        if recompute[number]:
            _recompute_and_backward(segments[number], memory, gradients)
            memory.release([segments[number - 1].output])  # the checkpoint's input
        else:
            simulate_backward(segments[number].operations, memory, gradients)
    return SimulatedMemory(kept, memory.peak)


def _simulate_all_forward(segments: Sequence[Segment], recompute: Sequence[bool], memory: MemoryTracker) -> None:
    for number, segment in enumerate(segments):
        if number == len(segments) - 1 and not any(recompute):
            memory.release(
                tensor
                for segment in segments
                for tensor in segment.shared
                if tensor not in segment.held_through_forward
            )
        simulate_forward(segment.operations, memory, live_out=segment.live_after, saves=not recompute[number])
        if recompute[number]:
            memory.retain(_left_by_checkpoint(segment))
        elif number:
            memory.release([segments[number - 1].output])
    memory.release(tensor for segment in segments for tensor in segment.cached)


def _left_by_checkpoint(segment: Segment) -> list[Tensor]:
    """Return what nodes hold by themselves; recomputed tensors are others, so that these are stand-ins."""
    clung = {tensor.memory for step in segment.operations if step.output.requires_grad for tensor in step.held_by_node}
    return [Tensor(tensor.elements, tensor.width) for tensor in clung]


def _recompute_and_backward(segment: Segment, memory: MemoryTracker, gradients: dict[Tensor, Tensor]) -> None:
    """Run backward to where something saved is needed, then forward again until all of that is there, then go on."""
    last = max((number for number, step in enumerate(segment.operations) if step.saved), default=-1) + 1
    simulate_backward(segment.operations[last:], memory, gradients)
    simulate_forward(segment.operations, memory, live_out=segment.cached, saves=True, until=last)
    memory.release(segment.cached)
    memory.release(
        tensor for step in segment.operations[:last] if step.output.requires_grad for tensor in step.held_by_node
    )
    simulate_backward(segment.operations[:last], memory, gradients)
