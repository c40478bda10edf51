"""Turns a valid spec into a plan: pure functions, shared by the operator and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_planner.plan import make_plan

__all__ = ["make_plan"]


def __getattr__(name: str) -> Any:
    """Import `make_plan` when it is asked for: `qlora validate` needs the rules only, and is twice as fast without."""
    if name != "make_plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qlora_planner.plan import make_plan  # noqa: PLC0415

    return make_plan
