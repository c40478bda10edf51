"""The processes of one run: the only reader of rank and world size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from torch import distributed


@dataclass(frozen=True)
class World:
    """One process among those of the run; alone, every operation is the identity."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def share(self, rows: Sequence[int]) -> Sequence[int]:
        """Return this process's part of a step's rows."""
        return rows[self.rank :: self.size]

    def any(self, flag: bool) -> bool:
        """Return whether any process raised the flag, so that all of them stop at the same step."""
        return self.total_of(float(flag)) > 0

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add the gradients of all processes; adapters are megabytes, so one call for all of them is enough."""
        if self.size == 1:
            return
        # An epoch's last step may have fewer rows than there are processes: who has none takes part with zeros.
        gradients = [_gradient_of(parameter) for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def total_of(self, number: float) -> float:
        """Return the sum of a number over all processes."""
        if self.size == 1:
            return number
        cell = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.all_reduce(cell)
        return float(cell)


def _gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def join_world(device: str) -> World:
    """Join the processes that the launcher started; without a launcher there is one."""
    state = PartialState(cpu=device == "cpu")
    return World(state.device, state.process_index, state.num_processes)
