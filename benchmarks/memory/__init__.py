"""Compares the predictions of qlora_planner.memory.activations with the memory of real training steps."""
