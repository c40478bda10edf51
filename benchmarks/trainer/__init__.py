"""Benchmark of the trainer against TRL and a tutorial script, on the same adapter, rows and machine: see README.md."""
