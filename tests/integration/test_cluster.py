"""The control plane that the other tests of this folder stand on is a real one."""

import botocore.exceptions
import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.programs.binaries import KUBERNETES_VERSION


def test_server_has_pinned_version(control_plane: Cluster) -> None:
    assert f'"gitVersion": "{KUBERNETES_VERSION}"' in control_plane.kubectl("get", "--raw=/version")


def test_objects_are_stored(control_plane: Cluster) -> None:
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "stored"}, "data": {"key": "value"}}
    control_plane.apply(config)
    assert control_plane.get("configmap", "stored")["data"] == {"key": "value"}


def test_controllers_work(control_plane: Cluster) -> None:
    control_plane.kubectl("create", "namespace", "controllers")
    control_plane.kubectl(
        "wait", "--for=create", "--timeout=30s", "--namespace=controllers", "serviceaccount", "default"
    )


def test_helm_accepts_the_server(control_plane: Cluster) -> None:
    assert control_plane.helm("list", "--output=json").strip() == "[]"


def test_conditional_write_succeeds_once(control_plane: Cluster) -> None:
    bucket = control_plane.s3.make_bucket("conditional-writes")
    client = control_plane.s3.client()
    client.put_object(Bucket=bucket, Key="manifest.json", Body=b"first", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError) as refusal:
        client.put_object(Bucket=bucket, Key="manifest.json", Body=b"second", IfNoneMatch="*")
    assert refusal.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=bucket, Key="manifest.json")["Body"].read() == b"first"
    client.close()
