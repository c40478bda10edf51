"""Status as a pure function of what is known."""

from qlora_operator.status.derive import acknowledge, derive_status, to_wire

__all__ = ["acknowledge", "derive_status", "to_wire"]
