"""Turns a valid spec into a plan: pure functions, shared by the operator and the command line."""

from qlora_planner.plan import make_plan

__all__ = ["make_plan"]
