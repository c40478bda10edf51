"""Logs of pods, live or archived in the output."""
