"""Pod logs, live or archived in the output."""
