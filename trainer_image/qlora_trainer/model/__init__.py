"""Base model, quantization, adapters, attention, loss and optimizer."""
