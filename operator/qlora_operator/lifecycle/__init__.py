"""Decides what to do next, from spec, status and children; pure functions and tables."""

from qlora_operator.lifecycle.context import ReconcileContext
from qlora_operator.lifecycle.decide import decide, is_terminal, needs_gpu_nodes, rejected, unexplained_jobs
from qlora_operator.lifecycle.exit_reasons import cause_of_exit
from qlora_operator.lifecycle.gang import classify
from qlora_operator.lifecycle.job_deadline import job_deadline
from qlora_operator.lifecycle.leftovers import leftover_jobs, next_leftover
from qlora_operator.lifecycle.retry_policy import avoided_nodes

__all__ = [
    "ReconcileContext",
    "avoided_nodes",
    "cause_of_exit",
    "classify",
    "decide",
    "is_terminal",
    "job_deadline",
    "leftover_jobs",
    "needs_gpu_nodes",
    "next_leftover",
    "rejected",
    "unexplained_jobs",
]
