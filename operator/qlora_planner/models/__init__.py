"""Shapes of model architectures, from their config.json."""
