"""Why something ended, and what comes next: pure tables."""

from qlora_operator.recovery.causes import cause_of_exit
from qlora_operator.recovery.gang import judge
from qlora_operator.recovery.next_action import is_terminal, next_action, plans_for_gpus, rejected

__all__ = ["cause_of_exit", "is_terminal", "judge", "next_action", "plans_for_gpus", "rejected"]
