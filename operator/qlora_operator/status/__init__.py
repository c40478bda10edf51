"""Derives the status of a QLoRAJob; pure functions."""

from qlora_operator.status.derive import (
    derive_alternatives,
    derive_status,
    held_gpus,
    to_wire,
    with_observed_generation,
)

__all__ = ["derive_alternatives", "derive_status", "held_gpus", "to_wire", "with_observed_generation"]
