"""The training loop: engine, state, checkpoints."""
