"""Where a prepare pod may run."""

from typing import Any, Final

import pytest

from qlora_api.v1alpha1 import Preparation
from qlora_operator.resources import Owner, build_prepare_job
from tests.make import INSTALLATION, REF, UID, make_spec

NODE_FAILURES: Final = [
    {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    for state in ("not-ready", "unreachable")
]
POOL: Final = {"key": "pool", "operator": "Equal", "value": "ml", "effect": "NoSchedule"}


def prepare_pod(preparation: Preparation | None = None, **resources: Any) -> dict[str, Any]:
    job = build_prepare_job(Owner(REF, UID), make_spec(resources=resources), INSTALLATION, preparation)
    return dict(job["spec"]["template"]["spec"])


def test_prepare_pod_leaves_a_dead_node_as_soon_as_training_pods() -> None:
    assert prepare_pod()["tolerations"] == NODE_FAILURES


def test_prepare_pod_runs_where_every_node_is_tainted() -> None:
    pod = prepare_pod(nodeSelector={"pool": "ml"}, tolerations=[POOL])
    assert pod["tolerations"] == [POOL, *NODE_FAILURES]
    assert "nodeSelector" not in pod, "an autoscaler would start a GPU node to check a manifest"


def test_toleration_of_everything_comes_after_those_of_failed_nodes() -> None:
    """The first match decides when a pod is evicted."""
    assert prepare_pod(tolerations=[{"operator": "Exists"}])["tolerations"] == [*NODE_FAILURES, {"operator": "Exists"}]


@pytest.mark.parametrize("label", ["kubernetes.io/arch", "kubernetes.io/os"])
def test_prepare_pod_selects_nodes_that_its_image_runs_on(label: str) -> None:
    assert prepare_pod(nodeSelector={label: "x", "pool": "ml"})["nodeSelector"] == {label: "x"}


def test_repeated_preparation_prefers_nodes_where_none_failed() -> None:
    pod = prepare_pod(Preparation(number=3, avoided_nodes=("bad", "worse")))
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("bad", "worse")]
    preferred = [{"weight": 100, "preference": {"matchFields": fields}}]
    assert pod["affinity"] == {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    assert "affinity" not in prepare_pod(Preparation(number=3))


def test_preparations_share_one_config_map() -> None:
    volumes = [prepare_pod(Preparation(number=number))["volumes"][0] for number in (1, 2, 40)]
    assert volumes == [{"name": "config", "configMap": {"name": f"{REF.name}-prepare"}}] * 3
