"""What the test cluster needs of this machine."""
