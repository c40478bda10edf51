"""Ten thousand QLoRAJobs on a real control plane, compared with JobSet on the same machine: see README.md."""
