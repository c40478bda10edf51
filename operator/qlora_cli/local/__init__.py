"""Runs on this computer: the trainer's libraries, and its output folder."""
