"""`qlora`, the command line; also `kubectl qlora`."""
