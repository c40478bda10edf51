"""What broken nodes cost a fleet: `python -m benchmarks.fleet`."""
