"""The trainer: fine-tunes an adapter from a validated configuration and publishes it."""
