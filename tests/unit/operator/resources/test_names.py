"""Names of children: valid for the API server whatever the QLoRAJob is called, and never those of another run."""

import re
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api import names
from qlora_api.job_ref import JobRef
from qlora_cli.manifests.loader import Metadata
from qlora_operator.models import AttemptInputs, Manifest
from qlora_operator.resources import Owner, build_run_config, build_service, build_train_job
from qlora_planner import make_plan
from tests.make import INSTALLATION, UID, make_prepared, make_spec

DNS_1035_LABEL: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""What the name of a Service must match up to Kubernetes 1.35."""
DNS_1123_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
MAX_LABEL: Final = 63
MAX_DOMAIN: Final = 253
MAX_NAMESPACE: Final = 63
SPEC: Final = make_spec(resources={"nodes": 2, "gpusPerNode": 1})
LAST_ATTEMPT: Final = 999
JOB_NAMES: Final = st.from_regex(DNS_1123_LABEL, fullmatch=True).filter(lambda name: len(name) <= names.MAX_JOB_NAME)


def build_gang(name: str, attempt: int) -> tuple[Manifest, Manifest, Manifest]:
    owner = Owner(JobRef("ml", name), UID)
    run = AttemptInputs(attempt, make_plan(SPEC, make_prepared()), make_prepared())
    return (
        build_service(owner, attempt),
        build_train_job(owner, SPEC, run, INSTALLATION),
        build_run_config(owner, SPEC, run, INSTALLATION),
    )


def check_names(name: str, attempt: int) -> None:
    service, job, config = build_gang(name, attempt)
    pod = job["spec"]["template"]["spec"]
    [main] = [entry["value"] for entry in pod["containers"][0]["env"] if entry["name"] == names.MAIN_ADDRESS_ENV]
    host, _, subdomain = main.partition(".")
    assert DNS_1035_LABEL.fullmatch(service["metadata"]["name"])
    assert subdomain == pod["subdomain"] == service["metadata"]["name"]
    assert host == f"{job['metadata']['name']}-0", "the host name that the Job controller gives to the pod of index 0"
    last_host = f"{job['metadata']['name']}-{SPEC.resources.nodes - 1 + 62}"
    for label in (host, last_host, subdomain, job["metadata"]["name"], config["metadata"]["name"]):
        assert DNS_1123_LABEL.fullmatch(label)
        assert len(label) <= MAX_LABEL
    domain = f"{last_host}.{subdomain}.{'n' * MAX_NAMESPACE}.svc.cluster.local"
    assert len(domain) <= MAX_DOMAIN


@pytest.mark.parametrize("name", ["7b-chat", "7", "0-0", "a", "support-bot", "7" * names.MAX_JOB_NAME])
@pytest.mark.parametrize("attempt", [1, LAST_ATTEMPT])
def test_children_of_gang_have_valid_names(name: str, attempt: int) -> None:
    check_names(name, attempt)


@given(name=JOB_NAMES, attempt=st.integers(1, LAST_ATTEMPT))
def test_children_of_gang_have_valid_names_for_every_job_name(name: str, attempt: int) -> None:
    assert Metadata(name=name).name == name, "a name that validate accepts"
    check_names(name, attempt)


@given(
    first=st.tuples(JOB_NAMES, st.integers(1, LAST_ATTEMPT)), second=st.tuples(JOB_NAMES, st.integers(1, LAST_ATTEMPT))
)
def test_attempts_of_several_jobs_never_share_service(first: tuple[str, int], second: tuple[str, int]) -> None:
    assert (names.gang_service_name(*first) == names.gang_service_name(*second)) == (first == second)
