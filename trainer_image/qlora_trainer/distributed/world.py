"""Process group of a run: sharding, collectives and barriers; with one process, every operation is the identity."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Final, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from qlora_api.strategies import SINGLE, STRATEGIES, Strategy, StrategyName
from qlora_api.v1alpha1 import Plan
from qlora_trainer.runtime.liveness import LIVENESS

COLLECTIVE_TIMEOUT: Final = timedelta(hours=12)
"""Longest wait in a collective: covers the slowest download or evaluation of a rank, such as 141 GB at 4 MB/s. The
heartbeat detects a hang after minutes."""

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class World:
    """The process group as one rank sees it; with one process, every operation is the identity."""

    device: torch.device
    rank: int = 0
    size: int = 1
    strategy: StrategyName = SINGLE.name

    @property
    def is_main_process(self) -> bool:
        """Return whether this is rank 0, which reports, saves checkpoints and publishes."""
        return self.rank == 0

    @property
    def sharing(self) -> Strategy:
        """Return what the strategy shards, and which passes are collective."""
        return STRATEGIES[self.strategy]

    @property
    def backward_is_collective(self) -> bool:
        """Return whether backward is collective: DeepSpeed reduces gradients in it."""
        return self.sharing.collective_backward

    @property
    def forward_is_collective(self) -> bool:
        """Return whether forward is collective too: ZeRO-3 all-gathers each layer's weights in it."""
        return self.sharing.collective_forward

    def shard(self, rows: Sequence[Item], rank: int | None = None) -> Sequence[Item]:
        """Return the shard of this rank, or of `rank`: every size-th row."""
        return rows[self.rank if rank is None else rank :: self.size]

    def map_sharded(self, rows: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Found]]) -> tuple[Found, ...]:
        """Run forward-only work on each rank's shard, and return the results of all rows in order, on every rank.

        If forward is collective, every rank processes all rows: shards of unequal length would deadlock.
        """
        if self.size == 1 or self.forward_is_collective:
            return tuple(work(rows))
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, tuple(work(self.shard(rows))))
        return tuple(parts[index % self.size][index // self.size] for index in range(len(rows)))

    def all_reduce_any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether any rank raised it, so that all ranks branch alike."""
        if self.size == 1:
            return flags
        cells = torch.tensor(flags, dtype=torch.float32, device=self.device)
        distributed.all_reduce(cells)
        return tuple(bool(cell) for cell in cells.tolist())

    def broadcast(self, value: Found) -> Found:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        # Rank 0 may take long to compute the value; its own watchdog covers that.
        with contextlib.nullcontext() if self.is_main_process else LIVENESS.paused():
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: Found) -> tuple[Found, ...]:
        """Return the values of all ranks, in rank order."""
        if self.size == 1:
            return (value,)
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return tuple(values)

    def gather(self, value: Found) -> tuple[Found, ...]:
        """Return the values of all ranks, in rank order, on rank 0, and nothing on the others.

        Through host memory: NCCL would collect the values of all ranks in the memory of every GPU.
        """
        if self.size == 1:
            return (value,)
        values: list[Any] | None = [None] * self.size if self.is_main_process else None
        distributed.gather_object(value, values, dst=0, group=_host_group())
        return tuple(values or ())

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            with contextlib.nullcontext() if self.is_main_process else LIVENESS.paused():
                distributed.barrier()

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Run the block on one process of each node first; the others then find its downloads."""
        if self.size == 1:
            yield
            return
        state = PartialState()
        waiting = contextlib.nullcontext() if state.is_local_main_process else LIVENESS.paused()
        with waiting, state.local_main_process_first():
            yield

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over all ranks in one all-reduce; an adapter's are only megabytes."""
        if self.size == 1:
            return
        # The last step of an epoch may have fewer rows than ranks; a rank without rows contributes zeros.
        gradients = [_gradient_of(parameter) for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def all_reduce_sum(self, number: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return number
        cell = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.all_reduce(cell)
        return float(cell)


@cache
def _host_group() -> Any:
    """Return a process group of all ranks whose collectives use host memory; the first call is collective."""
    return distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def _gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def join_world(device: str, strategy: StrategyName = SINGLE.name) -> World:
    """Join the process group that the launcher set up; without a launcher, a single process."""
    with LIVENESS.paused():  # the pods of other ranks may start later
        state = PartialState(cpu=device == "cpu", timeout=COLLECTIVE_TIMEOUT)
    return World(state.device, state.process_index, state.num_processes, strategy)


def join_planned_world(plan: Plan) -> World:
    """Join the process group, and check its size against the plan."""
    world = join_world(plan.device, plan.strategy)
    if world.size != plan.processes:
        raise RuntimeError(f"the plan has {plan.processes} processes, and {world.size} were started")
    return world


def leave_world() -> None:
    """Destroy the process group: without that, torch's threads may abort the process at exit."""
    _host_group.cache_clear()
    if distributed.is_initialized():
        distributed.destroy_process_group()
