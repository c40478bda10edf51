"""The images are what an administrator hopes for: small where they can be, without root, without torch to operate."""

import json
from typing import Any, Final

import pytest

from tests.cluster.node import buildah
from tests.cluster.node.images import ensure_base_image, local_images
from tests.e2e.installation import Installation

MAX_ADDED_BYTES: Final = 150 * 10**6
"""What the operator may add to its base."""


def inspect(reference: str) -> dict[str, Any]:
    return json.loads(buildah.buildah("inspect", "--type=image", reference))


def size(reference: str) -> int:
    """Bytes of all layers, uncompressed."""
    [image] = [image for image in local_images() if reference in (image.get("names") or [])]
    number, unit = str(image["size"]).split()
    return round(float(number) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()])


def test_the_operator_adds_little_to_its_base(installation: Installation):
    added = size(installation.operator_image) - size(ensure_base_image())
    assert 0 < added < MAX_ADDED_BYTES


@pytest.mark.parametrize("name", ["operator_image", "trainer_image"])
def test_nobody_runs_as_root(installation: Installation, name: str):
    assert inspect(getattr(installation, name))["OCIv1"]["config"]["User"] == "65532:65532"


def test_the_operator_has_no_torch(installation: Installation):
    security = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    say = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'boto3') if u.find_spec(n)])"
    container = {
        "name": "look",
        "image": installation.operator_image,
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", say],
        "securityContext": security,
    }
    namespace = installation.make_namespace("images")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "look", "namespace": namespace},
        "spec": {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container]},
    }
    assert installation.cluster.run_pod(pod) == "[]\n"
