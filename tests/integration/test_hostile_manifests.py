"""The corpus of hostile manifests before a real API server: what the CRD refuses needs no operator."""

import json

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.host.commands import CommandError
from tests.hostile import CORPUS, HARMLESS, REFUSED, Hostile
from tests.integration.test_crd import ROOT

NAMESPACE = "hostile"


@pytest.fixture(scope="module")
def answers(control_plane: Cluster) -> list[str]:
    """What the API server says of each, in one call; nothing is stored."""
    control_plane.kubectl("apply", "-f", str(ROOT / "crds/qlorajobs.qlora.dev.yaml"))
    control_plane.wait_until_served()
    control_plane.create_namespace(NAMESPACE)
    bundle = "\n".join(json.dumps(named(key, case)) for key, case in CORPUS.items())
    with pytest.raises(CommandError) as refusals:
        control_plane.kubectl("create", "--dry-run=server", "-f", "-", stdin=bundle)
    return str(refusals.value).splitlines()


def named(key: str, case: Hostile) -> dict[str, object]:
    """A manifest that the API server's answers call by its place in the corpus, unless its name is the point."""
    manifest = case.manifest(NAMESPACE)
    return {**manifest, "metadata": {"name": key, "namespace": NAMESPACE, **case.metadata}}


def words(case: Hostile) -> str:
    return case.fix if case.api is None else case.api


BY_CRD = {key: case for key, case in REFUSED.items() if case.api != ""}


@pytest.mark.parametrize(("key", "case"), BY_CRD.items(), ids=BY_CRD)
def test_hostile_manifest_is_rejected_with_field_and_fix(answers: list[str], key: str, case: Hostile) -> None:
    name = str(case.metadata.get("name", key))
    said = [line for line in answers if f'"{name}" is invalid' in line or "unknown field" in line]
    assert any(words(case) in line and case.field in line for line in said), "\n".join(said) or name


@pytest.mark.parametrize("key", HARMLESS)
def test_harmless_manifest_is_accepted(answers: list[str], key: str) -> None:
    assert not [line for line in answers if f'"{key}"' in line]
