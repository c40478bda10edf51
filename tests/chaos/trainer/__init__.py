"""Fault injection for the trainer: its process, its peers, its object store."""
