"""Runs on the local machine: the trainer's libraries, and access to the output."""
