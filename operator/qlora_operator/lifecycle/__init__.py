"""Decides what to do next, from spec, status and children; pure functions and tables."""

from qlora_operator.lifecycle.budgets import time_left
from qlora_operator.lifecycle.context import Reception, ReconcileContext
from qlora_operator.lifecycle.decide import decide, is_terminal, needs_gpu_nodes, rejected
from qlora_operator.lifecycle.exit_reasons import cause_of_exit
from qlora_operator.lifecycle.gang import classify
from qlora_operator.lifecycle.node_health import (
    NodeFailure,
    disliked_nodes,
    is_blamed,
    node_failures,
    quarantined_nodes,
    recent_failures,
)
from qlora_operator.lifecycle.revive import retry_limits, revive

__all__ = [
    "NodeFailure",
    "Reception",
    "ReconcileContext",
    "cause_of_exit",
    "classify",
    "decide",
    "disliked_nodes",
    "is_blamed",
    "is_terminal",
    "needs_gpu_nodes",
    "node_failures",
    "quarantined_nodes",
    "recent_failures",
    "rejected",
    "retry_limits",
    "revive",
    "time_left",
]
