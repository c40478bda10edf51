"""Breaks what a training stands on: its process, its neighbours, its object store."""
