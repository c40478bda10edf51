"""The chart's own test, on the release that the other tests use."""

from tests.e2e.installation import OPERATOR_NAMESPACE, RELEASE, Installation


def test_helm_test_finds_the_release_well(installation: Installation) -> None:
    said = installation.cluster.helm("test", RELEASE, f"--namespace={OPERATOR_NAMESPACE}", "--timeout=2m")
    assert "Succeeded" in said
