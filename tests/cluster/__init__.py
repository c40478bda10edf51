"""A real Kubernetes on one Linux machine, without a container registry: README.md says how to use it."""
