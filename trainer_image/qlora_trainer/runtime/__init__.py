"""The process itself: rank, shutdown, liveness, metrics, termination message."""
