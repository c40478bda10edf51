"""Breaks what a run stands on, for real, and holds the promises of docs/reliability.md against it."""
