"""The parts of the test cluster that need no node."""
