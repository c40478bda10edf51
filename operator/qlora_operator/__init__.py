"""The operator: watches QLoRAJobs, runs their pods and keeps their status true."""
