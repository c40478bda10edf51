"""S3, local folders, the model hub, credentials, snapshots and results."""
