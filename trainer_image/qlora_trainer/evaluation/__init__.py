"""Validation loss, generated answers, scores and benchmark tasks."""
