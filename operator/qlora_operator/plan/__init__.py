"""Turns a checked spec into numbers; used by the operator and by the command line without a cluster."""

from qlora_operator.plan.plan import make_plan

__all__ = ["make_plan"]
