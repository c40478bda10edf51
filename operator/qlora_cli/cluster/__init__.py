"""Reading and writing QLoRAJobs and their children in a cluster."""
