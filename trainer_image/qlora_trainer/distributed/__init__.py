"""The launcher and the process group."""
