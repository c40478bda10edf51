"""Ten thousand QLoRAJobs on a real control plane, and JobSet doing the same work in the same run: see README.md."""
