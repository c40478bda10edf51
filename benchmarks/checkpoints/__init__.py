"""How long a training waits for its checkpoints."""
