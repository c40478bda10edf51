"""Fixtures of every folder; those that start a cluster live in tests/cluster/fixtures.py."""

pytest_plugins = ["tests.chaos.promises", "tests.cluster.fixtures", "tests.e2e.installation"]
