"""Manifest files: YAML, overrides, and what is wrong with them."""
