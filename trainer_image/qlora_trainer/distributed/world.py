"""The processes of one run, as each of them sees the others."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from qlora_api.strategies import SINGLE, STRATEGIES, Strategy, StrategyName
from qlora_api.v1alpha1 import Plan
from qlora_trainer.runtime.liveness import LIVENESS

COLLECTIVE_TIMEOUT: Final = timedelta(minutes=30)
"""Longest wait of a process for the others: the slowest download or evaluation of one of them; a hang is seen before,
by its missing progress."""

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class World:
    """One process among those of the run; alone, every operation is the identity."""

    device: torch.device
    rank: int = 0
    size: int = 1
    strategy: StrategyName = SINGLE.name

    @property
    def is_main_process(self) -> bool:
        """Return whether this process speaks for all: it reports, saves and publishes."""
        return self.rank == 0

    @property
    def sharing(self) -> Strategy:
        """Return what the strategy divides, and when it needs all processes at once."""
        return STRATEGIES[self.strategy]

    @property
    def backward_is_collective(self) -> bool:
        """Return whether every backward pass is made by all processes at once: DeepSpeed adds up gradients in it."""
        return self.sharing.collective_backward

    @property
    def forward_is_collective(self) -> bool:
        """Return whether forward passes are too: ZeRO-3 collects each layer's weights from all processes."""
        return self.sharing.collective_forward

    def shard(self, rows: Sequence[Item], rank: int | None = None) -> Sequence[Item]:
        """Return the part of the rows that is this process's, or another one's."""
        return rows[self.rank if rank is None else rank :: self.size]

    def map_sharded(self, rows: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Found]]) -> tuple[Found, ...]:
        """Let each process do its share of a forward work, and return all that was found, in the order of the rows.

        Where passes are made in step, all of them do all of it: shares of different lengths would wait for ever.
        """
        if self.size == 1 or self.forward_is_collective:
            return tuple(work(rows))
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, tuple(work(self.shard(rows))))
        return tuple(parts[place % self.size][place // self.size] for place in range(len(rows)))

    def all_reduce_any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether any process raised it, so that all of them do the same next."""
        if self.size == 1:
            return flags
        cells = torch.tensor(flags, dtype=torch.float32, device=self.device)
        distributed.all_reduce(cells)
        return tuple(bool(cell) for cell in cells.tolist())

    def broadcast(self, value: Found) -> Found:
        """Return the first process's value in all of them."""
        if self.size == 1:
            return value
        values = [value]
        # The first process may take its time for what it tells, and is watched itself.
        with contextlib.nullcontext() if self.is_main_process else LIVENESS.paused():
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: Found) -> tuple[Found, ...]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return (value,)
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return tuple(values)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            with contextlib.nullcontext() if self.is_main_process else LIVENESS.paused():
                distributed.barrier()

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let one process of each node go first: the others find what it downloaded."""
        if self.size == 1:
            yield
            return
        state = PartialState()
        resting = contextlib.nullcontext() if state.is_local_main_process else LIVENESS.paused()
        with resting, state.local_main_process_first():
            yield

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
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

    def all_reduce_sum(self, number: float) -> float:
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


def join_world(device: str, strategy: StrategyName = SINGLE.name) -> World:
    """Join the processes that the launcher started; without a launcher there is one."""
    with LIVENESS.paused():  # the others' pods may start later
        state = PartialState(cpu=device == "cpu", timeout=COLLECTIVE_TIMEOUT)
    return World(state.device, state.process_index, state.num_processes, strategy)


def join_planned_world(plan: Plan) -> World:
    """Join the processes of a plan, and no others."""
    world = join_world(plan.device, plan.strategy)
    if world.size != plan.processes:
        raise RuntimeError(f"the plan has {plan.processes} processes, and {world.size} were started")
    return world


def leave_world() -> None:
    """End this process's part: torch's threads may abort a process that ends without."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
