"""Derives the status of a QLoRAJob; pure functions."""

from qlora_operator.status.derive import (
    derive_alternatives,
    derive_checkpoint,
    derive_status,
    merge_attempt,
    to_wire,
    with_observed_generation,
    without_refused_reasons,
)

__all__ = [
    "derive_alternatives",
    "derive_checkpoint",
    "derive_status",
    "merge_attempt",
    "to_wire",
    "with_observed_generation",
    "without_refused_reasons",
]
