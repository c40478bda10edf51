"""Simulates the memory of a forward and a backward pass as autograd allocates and frees it; knows no model.

A model is recorded as the operations that it runs, on tensors that have a size and no content. In the forward pass,
every tensor is allocated when it is computed and freed when nothing needs it any more; in the backward pass, gradients
are allocated and saved tensors are freed. The peak is the maximum at any time.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor's size, without its content; compared by identity."""

    elements: int
    width: int
    """Bytes per element."""
    requires_grad: bool = False
    """Backward computes its gradient."""
    persistent: bool = False
    """It outlives the pass, as a weight does, and is counted elsewhere."""
    source: "Tensor | None" = None
    """The tensor whose memory it shares, if it is a view."""

    @property
    def bytes(self) -> int:
        """Return its bytes; a view takes none of its own."""
        return self.elements * self.width

    @property
    def memory(self) -> "Tensor":
        """Return the tensor that owns its memory."""
        return self if self.source is None else self.source.memory


@dataclass(frozen=True, eq=False)
class Operation:
    """One node of the autograd graph."""

    output: Tensor
    inputs: tuple[Tensor, ...]
    saved: tuple[Tensor, ...] = ()
    """Tensors saved for its backward."""
    held_by_node: tuple[Tensor, ...] = ()
    """Tensors that its node holds outside of saved tensors: not freed by checkpointing, but with the graph."""
    grad_aliases: tuple[Tensor, ...] = ()
    """Inputs whose gradient is the gradient of the output, without new memory."""
    forward_workspace: int = 0
    """Bytes that it needs besides its output while it runs."""
    backward_workspace: int = 0


@dataclass(frozen=True)
class Segment:
    """Operations that are recomputed together under gradient checkpointing."""

    operations: tuple[Operation, ...]
    output: Tensor
    shared: tuple[Tensor, ...] = ()
    """Masks and tables that are held, besides the output, until the last segment; checkpoints hold them to the end."""
    held_through_forward: tuple[Tensor, ...] = ()
    """Those of `shared` that are held until the end of the pass."""
    cached: tuple[Tensor, ...] = ()
    """Casts of weights, which autocast caches until the end of the forward pass or the recomputation."""

    @property
    def live_after(self) -> tuple[Tensor, ...]:
        """Return the tensors that are alive after the segment."""
        return (self.output, *self.shared, *self.cached)


@dataclass
class MemoryTracker:
    """Reference counts of tensors: allocated with the first holder, freed with the last."""

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
        """Remove a holder from each."""
        for tensor in tensors:
            owner = tensor.memory
            if not owner.persistent:
                self.holders[owner] -= 1
                self.now -= 0 if self.holders[owner] else owner.bytes

    def allocate_briefly(self, size: int) -> None:
        """Allocate some bytes and free them at once."""
        self.peak = max(self.peak, self.now + size)


def simulate_forward(
    operations: Sequence[Operation],
    memory: MemoryTracker,
    *,
    live_out: Sequence[Tensor] = (),
    saves: bool,
    until: int | None = None,
) -> None:
    """Simulate operations forward; afterwards only `live_out` and saved tensors are alive.

    Args:
        operations: Operations in order.
        memory: Where allocations are tracked.
        live_out: Tensors that stay alive; every other one is freed after the last operation that reads it.
        saves: Whether tensors are saved for backward.
        until: Stop before this operation, and free all temporaries; None runs all of them.

    """
    last_use = {tensor.memory: index for index, operation in enumerate(operations) for tensor in operation.inputs}
    last_use |= {tensor.memory: len(operations) for tensor in live_out}
    allocated: set[Tensor] = set()
    for index, operation in enumerate(operations[:until]):
        if operation.output.memory not in allocated:
            allocated.add(operation.output.memory)
            memory.retain([operation.output])
        memory.allocate_briefly(operation.forward_workspace)
        if saves and operation.output.requires_grad:
            memory.retain(operation.saved)
            memory.retain(operation.held_by_node)
        unused = {
            tensor.memory
            for tensor in (*operation.inputs, operation.output)
            if last_use.get(tensor.memory, -1) <= index
        }
        memory.release(unused & allocated)
        allocated -= unused
    memory.release(allocated - {tensor.memory for tensor in live_out})


def simulate_backward(operations: Sequence[Operation], memory: MemoryTracker, gradients: dict[Tensor, Tensor]) -> None:
    """Simulate operations backward; `gradients` maps outputs to their gradients on entry, inputs on return."""
    for operation in reversed(operations):
        gradient = gradients.pop(operation.output, None)
        computed = _gradients_of_inputs(operation, gradient)
        memory.retain(grad for _, grad in computed)
        memory.allocate_briefly(operation.backward_workspace if gradient else 0)
        if operation.output.requires_grad:
            memory.release(operation.saved)
        if gradient:
            memory.release([gradient])
        for tensor, grad in computed:
            _accumulate(tensor, grad, memory, gradients)


def _gradients_of_inputs(operation: Operation, gradient: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if gradient is None:
        return []
    trainable = [tensor for tensor in operation.inputs if tensor.requires_grad]
    return [
        (tensor, gradient if tensor in operation.grad_aliases else Tensor(tensor.elements, tensor.width))
        for tensor in trainable
    ]


def _accumulate(tensor: Tensor, gradient: Tensor, memory: MemoryTracker, gradients: dict[Tensor, Tensor]) -> None:
    """Accumulate a gradient: in place if nothing else holds the existing one, as in autograd's input buffers."""
    existing = gradients.get(tensor)
    if tensor.persistent:  # accumulated into the parameter's .grad, which exists already
        memory.release([gradient])
    elif existing is None:
        gradients[tensor] = gradient
    elif memory.holders[existing.memory] == 1:
        memory.release([gradient])
    else:
        gradients[tensor] = Tensor(tensor.elements, tensor.width)
        memory.retain([gradients[tensor]])
        memory.release([existing, gradient])


@dataclass(frozen=True)
class SimulatedMemory:
    """Bytes of one forward and backward pass."""

    saved: int
    """At the end of forward: what is saved for backward."""
    peak: int


def simulate(segments: Sequence[Segment], *, recompute: Sequence[bool]) -> SimulatedMemory:
    """Simulate segments forward and backward; recomputed ones save only their input.

    Args:
        segments: The model in order; the output of the last one is the loss.
        recompute: Whether each segment is checkpointed.

    """
    memory = MemoryTracker()
    _simulate_all_forward(segments, recompute, memory)
    saved = memory.now
    loss = segments[-1].output
    gradients = {loss: Tensor(loss.elements, loss.width)}
    memory.retain(gradients.values())
    for number in reversed(range(len(segments))):
        if recompute[number]:
            _recompute_and_backward(segments[number], memory, gradients)
            memory.release([segments[number - 1].output])  # the checkpoint's input
        else:
            simulate_backward(segments[number].operations, memory, gradients)
    return SimulatedMemory(saved, memory.peak)


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
    """Return copies of the tensors that a checkpointed segment's nodes hold; recomputation allocates new ones."""
    held = {
        tensor.memory
        for operation in segment.operations
        if operation.output.requires_grad
        for tensor in operation.held_by_node
    }
    return [Tensor(tensor.elements, tensor.width) for tensor in held]


def _recompute_and_backward(segment: Segment, memory: MemoryTracker, gradients: dict[Tensor, Tensor]) -> None:
    """Simulate backward until saved tensors are needed, recompute forward until they exist, then continue backward."""
    end = max((number for number, operation in enumerate(segment.operations) if operation.saved), default=-1) + 1
    simulate_backward(segment.operations[end:], memory, gradients)
    simulate_forward(segment.operations, memory, live_out=segment.cached, saves=True, until=end)
    memory.release(segment.cached)
    memory.release(
        tensor
        for operation in segment.operations[:end]
        if operation.output.requires_grad
        for tensor in operation.held_by_node
    )
    simulate_backward(segment.operations[:end], memory, gradients)
