"""Whatever is wrong with the input ends before a GPU pod exists, with a reason, the field and the fix."""

from typing import Any, Final

import pytest

from tests.cluster.host.addresses import free_ports
from tests.cluster.node.network import GATEWAY
from tests.cluster.programs.binaries import binary
from tests.e2e.installation import TRANSCRIPT, Installation, manifest_of
from tests.hub import FakeHub, Repository

NAMESPACE: Final = "bad-input"
MODEL_FILES: Final = "models--example--pickled"
COMMIT: Final = "1" * 40
GOOD_ROW: Final = b'{"instruction": "Say hello.", "response": "Hello."}\n'

IMPATIENT: Final[dict[str, dict[str, Any]]] = {"resources": {"gpusPerNode": 1}, "deadlines": {"startup": "30s"}}
"""What is missing is waited for so long; the image is on the node, so that a pod starts in a few seconds."""
CASES: Final[dict[str, tuple[dict[str, Any], str, tuple[str, ...]]]] = {
    "missing-dataset": (
        {"dataset": {"uri": "s3://quickstart/none.jsonl"}},
        "DatasetNotFound",
        ("spec.dataset.uri", "s3://quickstart/none.jsonl"),
    ),
    "row-without-answer": (
        {"dataset": {"uri": "s3://quickstart/no-answer.jsonl"}},
        "DatasetInvalid",
        ("spec.dataset.uri", "row 3", "response"),
    ),
    "empty-dataset": (
        {"dataset": {"uri": "s3://quickstart/empty.jsonl"}},
        "DatasetEmpty",
        ("spec.dataset.uri", "the file has no rows"),
    ),
    "missing-model": (
        {"model": {"uri": "hf://HuggingFaceTB/NoSuchModel"}},
        "ModelNotFound",
        ("spec.model.uri", "HuggingFaceTB/NoSuchModel"),
    ),
    "pickled-model": (
        {"model": {"uri": "hf://example/pickled"}},
        "UnsafeModelFormat",
        ("spec.model.uri", "pytorch_model.bin", "safetensors"),
    ),
    "missing-secret": (
        {"output": {"secretRef": {"name": "nowhere"}}},
        "SecretNotFound",
        ("spec.output.secretRef", "nowhere", NAMESPACE),
    ),
    "read-only-output": (
        {"output": {"secretRef": {"name": "read-only"}}},
        "S3Denied",
        ("spec.output.uri", "s3://adapters/quickstart"),
    ),
}


@pytest.fixture(scope="module")
def submitted(installation: Installation) -> Installation:
    """Every broken job, submitted at once; each asks for a GPU, so that asking for one would show."""
    installation.make_namespace(NAMESPACE)
    put_broken_inputs(installation)
    serve_read_only(installation)
    for name, (blocks, _, _) in CASES.items():
        installation.submit(manifest_of(name, NAMESPACE, **IMPATIENT, **blocks))
    return installation


def put_broken_inputs(installation: Installation) -> None:
    client = installation.cluster.s3.client()
    client.put_object(Bucket="quickstart", Key="empty.jsonl", Body=b"")
    broken = GOOD_ROW * 2 + b'{"instruction": "Say nothing."}\n' + GOOD_ROW
    client.put_object(Bucket="quickstart", Key="no-answer.jsonl", Body=broken)
    client.put_object(Bucket="models", Key=f"hub/{MODEL_FILES}/refs/main", Body=COMMIT.encode())
    for file in ("config.json", "pytorch_model.bin"):
        client.put_object(Bucket="models", Key=f"hub/{MODEL_FILES}/snapshots/{COMMIT}/{file}", Body=b"{}")
    client.close()


def serve_read_only(installation: Installation) -> None:
    """Start a second S3 server on the same objects that refuses to write, and a Secret that points to it."""
    cluster = installation.cluster
    assert cluster.processes
    assert cluster.state
    [port] = free_ports(1)
    address = f"{GATEWAY}:{port}"
    keys = {"ROOT_ACCESS_KEY_ID": cluster.s3.access_key, "ROOT_SECRET_ACCESS_KEY": cluster.s3.secret_key}
    argv = [binary("versitygw"), "--readonly", "--port", address, "posix", cluster.state.folder / "s3"]
    cluster.processes.start("versitygw-read-only", argv, {**keys, "VGW_QUIET": "true"})
    cluster.processes.wait_for_port("versitygw-read-only", GATEWAY, port)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "read-only", "namespace": NAMESPACE}}
    cluster.apply({**secret, "stringData": {**cluster.s3.environment(), "AWS_ENDPOINT_URL": f"http://{address}"}})


@pytest.mark.parametrize("name", CASES)
def test_bad_input_fails_in_prepare(submitted: Installation, name: str):
    _, reason, fragments = CASES[name]
    assert_refused(submitted, name, reason, fragments)


def assert_refused(installation: Installation, name: str, reason: str, fragments: tuple[str, ...]) -> None:
    job = installation.wait_until_finished(name, NAMESPACE, 240)
    conditions = {each["type"]: each for each in job["status"]["conditions"]}
    assert conditions["Succeeded"]["status"] == "False"
    assert conditions["Stalled"]["status"] == "True"
    TRANSCRIPT.mkdir(parents=True, exist_ok=True)
    (TRANSCRIPT / f"{name}.txt").write_text(job["status"]["message"], encoding="utf-8")
    assert conditions["Finished"]["reason"] == reason, conditions["Finished"]["message"]
    for fragment in fragments:
        assert fragment in conditions["Finished"]["message"]
    roles = {each["metadata"]["labels"]["qlora.dev/role"] for each in installation.children("jobs", name, NAMESPACE)}
    assert roles <= {"prepare"}


def test_a_gated_model(submitted: Installation):
    """The hub denies access without a token, and with the token of an account that has not accepted the license."""
    gated = Repository({"config.json": b"{}", "model.safetensors": b""}, token="hf_accepted")
    with FakeHub({"example/gated": gated}, GATEWAY) as hub:
        submitted.configure({"platform.hub.mirror": "", "platform.hub.endpoint": hub.endpoint})
        try:
            secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hf-token", "namespace": NAMESPACE}}
            submitted.cluster.apply({**secret, "stringData": {"HF_TOKEN": "hf_refused"}})
            model = {"uri": "hf://example/gated"}
            with_token = {**model, "secretRef": {"name": "hf-token"}}
            submitted.submit(manifest_of("gated-no-token", NAMESPACE, model=model, **IMPATIENT))
            submitted.submit(manifest_of("gated-refused", NAMESPACE, model=with_token, **IMPATIENT))
            for name in ("gated-no-token", "gated-refused"):
                assert_refused(submitted, name, "GatedModelNoAccess", ("spec.model", "example/gated"))
        finally:
            submitted.configure({"platform.hub.mirror": "s3://models/hub", "platform.hub.endpoint": ""})


def test_no_pod_requested_a_gpu(submitted: Installation):
    pods = submitted.cluster.get("pods", f"--namespace={NAMESPACE}")["items"]
    assert len(pods) >= len(CASES)
    limits = [pod["spec"]["containers"][0].get("resources", {}).get("limits", {}) for pod in pods]
    assert [each for each in limits if "nvidia.com/gpu" in each] == []
