"""Decides what to do next, from spec, status and children; pure functions and tables."""

from qlora_operator.lifecycle.context import ReconcileContext
from qlora_operator.lifecycle.decide import decide, is_terminal, needs_gpu_nodes, rejected
from qlora_operator.lifecycle.exit_reasons import cause_of_exit
from qlora_operator.lifecycle.gang import classify
from qlora_operator.lifecycle.resumption import reported_checkpoint
from qlora_operator.lifecycle.retry_policy import avoided_nodes, time_left

__all__ = [
    "ReconcileContext",
    "avoided_nodes",
    "cause_of_exit",
    "classify",
    "decide",
    "is_terminal",
    "needs_gpu_nodes",
    "rejected",
    "reported_checkpoint",
    "time_left",
]
