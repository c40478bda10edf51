"""The command line `qlora`, also installed as `kubectl qlora`."""
