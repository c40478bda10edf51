"""Training pods: what tolerates what, in which order."""

from typing import Any, Final

import pytest

from qlora_operator.models import AttemptInputs
from qlora_operator.resources import build_train_job
from qlora_planner import make_plan
from tests.make import INSTALLATION, OWNER, make_prepared, make_spec

UNREACHABLE: Final = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}


def eviction_seconds(tolerations: list[dict[str, Any]], taint: dict[str, str]) -> int | None:
    """What taint eviction waits: the first toleration that matches decides (GetMatchingTolerations)."""
    first = next(
        toleration
        for toleration in tolerations
        if toleration.get("key") in {None, "", taint["key"]}
        and toleration.get("effect") in {None, taint["effect"]}
        and (toleration["operator"] == "Exists" or toleration.get("value", "") == "")
    )
    return first.get("tolerationSeconds")


def train_tolerations(*tolerations: dict[str, Any]) -> list[dict[str, Any]]:
    spec = make_spec(resources={"gpusPerNode": 1, "tolerations": list(tolerations)})
    run = AttemptInputs(1, make_plan(spec, make_prepared()), make_prepared())
    pod = build_train_job(OWNER, spec, run, INSTALLATION)["spec"]["template"]["spec"]
    return list(pod["tolerations"])


def test_pod_for_a_partition_requests_tolerates_and_selects_it() -> None:
    mig = "nvidia.com/mig-3g.40gb"
    spec = make_spec(resources={"gpusPerNode": 1, "gpuResource": mig})
    plan = make_plan(spec, make_prepared()).model_copy(update={"gpu_products": ("A", "B"), "min_gpu_memory": 40 << 30})
    job = build_train_job(OWNER, spec, AttemptInputs(1, plan, make_prepared()), INSTALLATION)
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"memory": "16Gi", mig: 1}
    assert {"key": mig, "operator": "Exists"} in pod["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]
    affinity = pod["affinity"]["nodeAffinity"]
    [term] = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [item["key"] for item in term["matchExpressions"]] == [f"{mig}.product", f"{mig}.memory"]
    [preferred] = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["preference"]["matchExpressions"][0]["key"] == f"{mig}.product"


@pytest.mark.parametrize(
    "everything",
    [
        {"operator": "Exists"},
        {"operator": "Exists", "effect": "NoExecute"},
        {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 86_400},
    ],
)
def test_pod_that_tolerates_everything_leaves_dead_node_after_a_minute(everything: dict[str, Any]) -> None:
    assert eviction_seconds(train_tolerations(everything), UNREACHABLE) == 60


def test_pod_that_tolerates_its_pool_leaves_dead_node_after_a_minute() -> None:
    assert eviction_seconds(train_tolerations({"key": "pool", "operator": "Exists"}), UNREACHABLE) == 60


def test_toleration_that_names_the_taint_of_dead_nodes_is_kept() -> None:
    own = {**UNREACHABLE, "operator": "Exists", "tolerationSeconds": 300}
    assert eviction_seconds(train_tolerations({"key": "pool", "operator": "Exists"}, own), UNREACHABLE) == 300
