"""Decides what to do next, from spec, status and children; pure functions and tables."""

from qlora_operator.lifecycle.context import Claimant, Reception, ReconcileContext
from qlora_operator.lifecycle.decide import (
    decide,
    is_terminal,
    is_under_way,
    keep_as_it_is,
    needs_gpu_nodes,
    rejected,
    unexplained_jobs,
    vanished_attempt,
)
from qlora_operator.lifecycle.exit_reasons import cause_of_exit
from qlora_operator.lifecycle.gang import classify
from qlora_operator.lifecycle.job_deadline import job_deadline
from qlora_operator.lifecycle.leftovers import leftover_jobs, next_leftover
from qlora_operator.lifecycle.node_health import disliked_nodes, is_blamed, node_failures, node_starts
from qlora_operator.lifecycle.quarantine import NodeFailure, NodeStart, is_recent, quarantine_ends, quarantined_nodes
from qlora_operator.lifecycle.resumption import checkpoint_of_restart, reported_checkpoint, reported_manifests
from qlora_operator.lifecycle.revive import retry_limits, revive
from qlora_operator.lifecycle.usage import account, is_uncertain

__all__ = [
    "Claimant",
    "NodeFailure",
    "NodeStart",
    "Reception",
    "ReconcileContext",
    "account",
    "cause_of_exit",
    "checkpoint_of_restart",
    "classify",
    "decide",
    "disliked_nodes",
    "is_blamed",
    "is_recent",
    "is_terminal",
    "is_uncertain",
    "is_under_way",
    "job_deadline",
    "keep_as_it_is",
    "leftover_jobs",
    "needs_gpu_nodes",
    "next_leftover",
    "node_failures",
    "node_starts",
    "quarantine_ends",
    "quarantined_nodes",
    "rejected",
    "reported_checkpoint",
    "reported_manifests",
    "retry_limits",
    "revive",
    "unexplained_jobs",
    "vanished_attempt",
]
