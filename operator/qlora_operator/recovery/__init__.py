"""Why something ended, and what comes next: pure tables."""

from qlora_operator.recovery.causes import cause_of_exit
from qlora_operator.recovery.gang import judge
from qlora_operator.recovery.next_action import is_terminal, next_action, plans_for_gpus, rejected
from qlora_operator.recovery.retries import avoided_nodes, time_left
from qlora_operator.recovery.watch import Watch

__all__ = [
    "Watch",
    "avoided_nodes",
    "cause_of_exit",
    "is_terminal",
    "judge",
    "next_action",
    "plans_for_gpus",
    "rejected",
    "time_left",
]
