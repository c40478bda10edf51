"""The picture of docs/usage.md and the example output on it, from sample data through the real command."""
