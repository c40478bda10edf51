"""Progress reports, logs and experiment trackers."""
