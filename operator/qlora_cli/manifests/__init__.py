"""Manifest files: YAML, overrides, validation messages."""
