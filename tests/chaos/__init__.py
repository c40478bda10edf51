"""Injects real faults, and tests the promises of docs/reliability.md."""
