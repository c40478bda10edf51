"""Fixtures of every folder; those that start a cluster live in tests/cluster/fixtures.py."""

from hypothesis import settings

# Without a deadline: a busy machine is no failure. `make fuzz` tries other examples in each run, and more of them.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, max_examples=2000)
settings.load_profile("tests")

pytest_plugins = [
    "tests.chaos.promises",
    "tests.cluster.fixtures",
    "tests.e2e.installation",
    "tests.integration.fixtures",
    "tests.lanes",
]
