"""Torch's operations as the tape sees them: how large the result is, and what backward needs of it.

What an operation saves is in torch's tools/autograd/derivatives.yaml; a tensor is saved only if a gradient that is
wanted needs it, so that a frozen layer keeps little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_planner.memory.autograd_tape import Operation, Segment, Tensor
from qlora_planner.memory.forward_config import FP32


@dataclass
class Recorder:
    """Writes down operations in the order in which they run."""

    operations: list[Operation] = field(default_factory=list)
    cached: list[Tensor] = field(default_factory=list)
    """Casts of weights that autocast keeps."""

    def emit(
        self, elements: int, width: int, inputs: Sequence[Tensor] = (), saved: Sequence[Tensor | None] = ()
    ) -> Tensor:
        """Write down an operation, and return its result."""
        output = Tensor(elements, width, requires_grad=any(tensor.requires_grad for tensor in inputs))
        self.operations.append(Operation(output, tuple(inputs), tuple(each for each in saved if each)))
        return output

    def update_last(self, **changes: Any) -> Tensor:
        """Say more of the last operation, and return its result."""
        self.operations[-1] = replace(self.operations[-1], **changes)
        return self.operations[-1].output

    def save_output(self) -> Tensor:
        """Let the last operation save its own result as well."""
        last = self.operations[-1]
        return self.update_last(saved=(*last.saved, last.output))

    def keep_alive(self, *tensors: Tensor) -> None:
        """Note that variables of a Python function hold tensors until it returns."""
        self.operations.append(Operation(Tensor(0, 0), tensors))

    def end_segment(self, output: Tensor, *shared: Tensor) -> Segment:
        """Return what was written down since the last cut."""
        segment = Segment(tuple(self.operations), output, shared, cached=tuple(self.cached))
        self.operations, self.cached = [], []
        return segment

    def cast(self, x: Tensor, width: int) -> Tensor:
        """Cast to another dtype: a copy, of which backward needs nothing."""
        return x if x.width == width else self.emit(x.elements, width, [x])

    def cached_cast(self, weight: Tensor, width: int) -> Tensor:
        """Cast a weight as autocast does, which keeps the copy for its other uses in the pass."""
        if weight.width == width:
            return weight
        self.cached.append(self.cast(weight, width))
        return self.cached[-1]

    def clone(self, x: Tensor) -> Tensor:
        """Clone; the gradient is the clone's."""
        self.emit(x.elements, x.width, [x])
        return self.update_last(grad_aliases=(x,))

    def view(self, x: Tensor, elements: int, *, learns: bool) -> Tensor:
        """Show the memory of another tensor."""
        output = Tensor(elements, x.width, learns, source=x)
        self.operations.append(Operation(output, (x,)))
        return output

    def narrow(self, x: Tensor, elements: int) -> Tensor:
        """Slice: a view, whose gradient is a whole x of zeros with the part filled in."""
        return self.view(x, elements, learns=x.requires_grad)

    def scale(self, x: Tensor) -> Tensor:
        """Multiply by a number, or add one: backward needs nothing, but the gradient is new."""
        return self.emit(x.elements, x.width, [x])

    def cat(self, x: Tensor, y: Tensor) -> Tensor:
        """Concatenate; gradients are views of the result's."""
        self.emit(x.elements + y.elements, x.width, [x, y])
        return self.update_last(grad_aliases=(x, y))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Add; whoever has the result's dtype gets its gradient as it is."""
        width = max(x.width, y.width)
        self.emit(x.elements, width, [x, y])
        return self.update_last(grad_aliases=tuple(each for each in (x, y) if each.width == width))

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply, each needed for the other's gradient; a smaller one is spread, and its gradient summed up."""
        elements, width = max(x.elements, y.elements), max(x.width, y.width)
        self.emit(elements, width, [x, y], _needed(x, y))
        spread = any(each.requires_grad and each.elements < elements for each in (x, y))
        return self.update_last(backward_workspace=elements * width if spread else 0)

    def matmul(self, x: Tensor, y: Tensor, elements: int) -> Tensor:
        """Multiply matrices, each needed for the other's gradient."""
        return self.emit(elements, x.width, [x, y], _needed(x, y))

    def unary_saving_input(self, x: Tensor) -> Tensor:
        """Apply silu or gelu: backward computes from the input."""
        return self.emit(x.elements, x.width, [x], [x])

    def unary_saving_output(self, x: Tensor) -> Tensor:
        """Apply tanh or rsqrt: backward computes from the result."""
        self.emit(x.elements, x.width, [x])
        return self.save_output()

    def softmax(self, x: Tensor) -> Tensor:
        """Take the softmax in fp32, to which 16 bits are cast first."""
        return self.unary_saving_output(self.cast(x, FP32))

    def power(self, x: Tensor) -> Tensor:
        """Take a power; backward has x ** (n - 1) and n times that beside the gradient."""
        self.emit(x.elements, x.width, [x], [x])
        return self.update_last(backward_workspace=2 * x.bytes)

    def mean(self, x: Tensor, elements: int) -> Tensor:
        """Take means; their gradient is spread over what they are of."""
        return self.emit(elements, x.width, [x])


def _needed(x: Tensor, y: Tensor) -> list[Tensor]:
    return [other for one, other in ((x, y), (y, x)) if one.requires_grad]
