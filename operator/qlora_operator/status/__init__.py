"""Status as a pure function of what is known."""

from qlora_operator.status.derive import derive_status, to_wire, with_observed_generation

__all__ = ["derive_status", "to_wire", "with_observed_generation"]
