"""Docs: links, YAML, commands and pasted output."""
