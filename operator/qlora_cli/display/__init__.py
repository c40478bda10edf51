"""Output of the commands: tables, progress, results."""
