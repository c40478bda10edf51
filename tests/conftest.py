"""Fixtures of every folder; those that start a cluster live in tests/cluster/fixtures.py."""

from hypothesis import settings

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")

pytest_plugins = ["tests.chaos.promises", "tests.cluster.fixtures", "tests.e2e.installation", "tests.lanes"]
