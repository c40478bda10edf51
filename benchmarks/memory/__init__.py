"""Holds plan/activations.py to the bytes that real training steps take on this computer."""
