"""The real node, its network and its images."""
