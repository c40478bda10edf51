"""Whether runs with short answers are published."""
