"""GPU memory of a training step, computed tensor by tensor."""
