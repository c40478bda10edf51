"""Why something ended, and what comes next: pure tables."""

from qlora_operator.lifecycle.context import Watch
from qlora_operator.lifecycle.decide import is_terminal, next_action, plans_for_gpus, rejected
from qlora_operator.lifecycle.exit_reasons import cause_of_exit
from qlora_operator.lifecycle.gang import judge
from qlora_operator.lifecycle.retry_policy import avoided_nodes, time_left

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
