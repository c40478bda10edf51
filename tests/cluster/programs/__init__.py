"""The programs of the test cluster, and how they get onto this machine."""
