"""The trainer: turns a checked configuration into a published adapter."""
