"""Records torch operations for the simulation: the size of the result, and what autograd saves for backward.

torch's tools/autograd/derivatives.yaml lists what an operation saves; a tensor is saved only if a required gradient
needs it, so a frozen layer saves little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_planner.memory.autograd_tape import Operation, Segment, Tensor
from qlora_planner.memory.forward_config import FP32


@dataclass
class Recorder:
    """Records operations in the order in which they run."""

    operations: list[Operation] = field(default_factory=list)
    cached: list[Tensor] = field(default_factory=list)
    """Casts of weights that autocast caches."""

    def emit(
        self, elements: int, width: int, inputs: Sequence[Tensor] = (), saved: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """Record an operation, and return its result."""
        output = Tensor(elements, width, requires_grad=any(tensor.requires_grad for tensor in inputs))
        self.operations.append(Operation(output, tuple(inputs), tuple(each for each in saved if each)))
        return output

    def update_last(self, **changes: Any) -> Tensor:
        """Change fields of the last operation, and return its result."""
        self.operations[-1] = replace(self.operations[-1], **changes)
        return self.operations[-1].output

    def save_output(self) -> Tensor:
        """Make the last operation save its own result as well."""
        last = self.operations[-1]
        return self.update_last(saved=(*last.saved, last.output))

    def keep_alive(self, *tensors: Tensor) -> None:
        """Record that local variables of a Python function hold tensors up to here."""
        self.operations.append(Operation(Tensor(0, 0), tensors))

    def end_segment(self, output: Tensor, *shared: Tensor) -> Segment:
        """Return what was recorded since the last segment."""
        segment = Segment(tuple(self.operations), output, shared, cached=tuple(self.cached))
        self.operations, self.cached = [], []
        return segment

    def cast(self, x: Tensor, width: int) -> Tensor:
        """Cast to another dtype: a copy; backward needs nothing."""
        return x if x.width == width else self.emit(x.elements, width, [x])

    def cached_cast(self, weight: Tensor, width: int) -> Tensor:
        """Cast a weight as autocast does, which caches the copy for the rest of the pass."""
        if weight.width == width:
            return weight
        self.cached.append(self.cast(weight, width))
        return self.cached[-1]

    def clone(self, x: Tensor) -> Tensor:
        """Clone; the gradient is that of the clone, without a copy."""
        self.emit(x.elements, x.width, [x])
        return self.update_last(grad_aliases=(x,))

    def view(self, x: Tensor, elements: int, *, requires_grad: bool) -> Tensor:
        """Return a view of another tensor's memory."""
        output = Tensor(elements, x.width, requires_grad, source=x)
        self.operations.append(Operation(output, (x,)))
        return output

    def narrow(self, x: Tensor, elements: int) -> Tensor:
        """Slice: a view, whose gradient is as large as x, zero outside of the slice."""
        return self.view(x, elements, requires_grad=x.requires_grad)

    def scale(self, x: Tensor) -> Tensor:
        """Multiply by a scalar, or add one: backward needs nothing, but allocates the gradient."""
        return self.emit(x.elements, x.width, [x])

    def cat(self, x: Tensor, y: Tensor) -> Tensor:
        """Concatenate; the gradients are views of that of the result."""
        self.emit(x.elements + y.elements, x.width, [x, y])
        return self.update_last(grad_aliases=(x, y))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Add; inputs with the dtype of the result share its gradient."""
        width = max(x.width, y.width)
        self.emit(x.elements, width, [x, y])
        return self.update_last(grad_aliases=tuple(each for each in (x, y) if each.width == width))

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply, saving each factor for the other's gradient; a smaller one is broadcast, its gradient summed."""
        elements, width = max(x.elements, y.elements), max(x.width, y.width)
        self.emit(elements, width, [x, y], _needed(x, y))
        broadcast = any(each.requires_grad and each.elements < elements for each in (x, y))
        return self.update_last(backward_workspace=elements * width if broadcast else 0)

    def matmul(self, x: Tensor, y: Tensor, elements: int) -> Tensor:
        """Multiply matrices, saving each for the other's gradient."""
        return self.emit(elements, x.width, [x, y], _needed(x, y))

    def unary_saving_input(self, x: Tensor) -> Tensor:
        """Apply silu or gelu: backward computes from the input."""
        return self.emit(x.elements, x.width, [x], [x])

    def unary_saving_output(self, x: Tensor) -> Tensor:
        """Apply tanh or rsqrt: backward computes from the result."""
        self.emit(x.elements, x.width, [x])
        return self.save_output()

    def softmax(self, x: Tensor) -> Tensor:
        """Apply the softmax in fp32, after a cast from 16 bits."""
        return self.unary_saving_output(self.cast(x, FP32))

    def power(self, x: Tensor) -> Tensor:
        """Raise to a power; backward allocates x ** (n - 1) and n times that besides the gradient."""
        self.emit(x.elements, x.width, [x], [x])
        return self.update_last(backward_workspace=2 * x.bytes)

    def mean(self, x: Tensor, elements: int) -> Tensor:
        """Average; the gradient is broadcast over the inputs."""
        return self.emit(elements, x.width, [x])


def _needed(x: Tensor, y: Tensor) -> list[Tensor]:
    return [other for one, other in ((x, y), (y, x)) if one.requires_grad]
