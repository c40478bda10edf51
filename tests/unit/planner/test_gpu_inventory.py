"""Offers: node objects as GPU feature discovery labels them."""

import copy
from typing import Any, Final

import pytest

from qlora_api.accelerators import Accelerator, accelerator_of_resource
from qlora_api.v1alpha1 import ResourcesSpec
from qlora_planner import gpu_inventory
from qlora_planner.gpu_inventory import (
    GpuPool,
    UnusableNodes,
    find_unusable_nodes,
    memory_of_product,
    read_gpu_inventory,
)
from qlora_planner.quantities import parse_cores, parse_quantity

GIBIBYTE = 1 << 30


def make_node(
    product: str = "NVIDIA-A10",
    memory: str | None = "23028",
    gpus: str | None = "1",
    replicas: str = "1",
    capability: tuple[int, int] = (8, 6),
    *,
    allocatable: dict[str, str] | None = None,
    capacity: str | None = None,
    labelled: str | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A node with GPUs; labels as gpu-feature-discovery writes them."""
    major, minor = capability
    labels = {"nvidia.com/gpu.product": product, "nvidia.com/gpu.compute.major": f"{major}", "zone": "a"}
    labels |= {"nvidia.com/gpu.replicas": replicas}
    labels |= {"nvidia.com/gpu.compute.minor": f"{minor}"} | ({"nvidia.com/gpu.memory": memory} if memory else {})
    labels |= {"nvidia.com/gpu.count": labelled} if labelled else {}
    found = {"cpu": "8"} | ({"nvidia.com/gpu": gpus} if gpus else {}) | (allocatable or {})
    status = {"allocatable": found} | ({"capacity": {"nvidia.com/gpu": capacity}} if capacity else {})
    return {"metadata": {"name": "n", "labels": labels}, "spec": spec, "status": status}


A10 = GpuPool("NVIDIA-A10", 23_028 << 20, 1, 1, (8, 6))


def test_equal_nodes_are_pooled_smallest_first() -> None:
    nodes = [make_node("NVIDIA-H100-80GB-HBM3", "81559", "8"), make_node(), make_node(), make_node(gpus="4")]
    assert read_gpu_inventory(nodes, ResourcesSpec()) == (
        GpuPool("NVIDIA-A10", 23_028 << 20, 1, 2, (8, 6)),
        GpuPool("NVIDIA-A10", 23_028 << 20, 4, 1, (8, 6)),
        GpuPool("NVIDIA-H100-80GB-HBM3", 81_559 << 20, 8, 1, (8, 6)),
    )


@pytest.mark.parametrize(
    "node",
    [
        pytest.param(make_node(gpus=None), id="labels-but-no-device-plugin"),
        pytest.param(make_node(gpus="0"), id="all-unhealthy"),
        pytest.param(make_node(memory=None), id="memory-unknown"),
        pytest.param(make_node("Tesla-V100-SXM2-16GB", "16384", capability=(7, 0)), id="too-old-for-torch"),
        pytest.param(make_node(replicas="4", gpus="4"), id="sliced-by-time"),
        pytest.param(make_node(taints=[{"key": "team", "value": "b", "effect": "NoSchedule"}]), id="tainted"),
        pytest.param({"metadata": {"name": "n"}, "status": {"allocatable": {"cpu": "8"}}}, id="no-gpus"),
    ],
)
def test_nodes_without_usable_gpus_are_ignored(node: dict[str, Any]) -> None:
    assert read_gpu_inventory([node], ResourcesSpec()) == ()


def taint(key: str, effect: str = "NoSchedule") -> dict[str, str]:
    return {"key": key, "effect": effect}


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"unschedulable": True, "taints": [taint("node.kubernetes.io/unschedulable")]}, id="cordoned"),
        pytest.param({"taints": [taint("node.kubernetes.io/not-ready")]}, id="not-ready"),
        pytest.param({"taints": [taint("node.kubernetes.io/unreachable", "NoExecute")]}, id="unreachable"),
        pytest.param({"taints": [taint("node.kubernetes.io/disk-pressure")]}, id="disk-pressure"),
        pytest.param({"taints": [taint("ToBeDeletedByClusterAutoscaler")]}, id="scaled-down"),
        pytest.param({"taints": [taint("karpenter.sh/disrupted")]}, id="consolidated"),
        pytest.param({"taints": [taint("node.cilium.io/agent-not-ready")]}, id="network-starts"),
        pytest.param({"taints": [taint("startup-taint.cluster-autoscaler.kubernetes.io/gpu")]}, id="starts"),
        pytest.param({"taints": [taint("ignore-taint.cluster-autoscaler.kubernetes.io/gpu")]}, id="starts-old"),
        pytest.param({"taints": [taint("DeletionCandidateOfClusterAutoscaler")]}, id="scale-down-candidate"),
        pytest.param({"taints": [taint("aws-node-termination-handler/spot-itn")]}, id="spot-interruption"),
        pytest.param({"taints": [taint("cloud.google.com/impending-node-termination")]}, id="gke-maintenance"),
        pytest.param({"taints": [taint("node.gke.io/unhealthy")]}, id="gke-repair"),
        pytest.param({"taints": [taint("weave.works/kured-node-reboot")]}, id="reboot"),
        pytest.param({"taints": [taint("remediation.medik8s.io/unhealthy")]}, id="remediation"),
        pytest.param({"taints": [taint("nvsentinel.nvidia.com/quarantine")]}, id="gpu-remediation"),
        pytest.param({"gpus": "0", "capacity": "1"}, id="device-plugin-restarts"),
        pytest.param({"gpus": "0", "labelled": "1"}, id="device-plugin-is-away"),
        pytest.param({"gpus": None, "labelled": "1"}, id="driver-upgrade"),
        pytest.param({"gpus": "0", "labelled": "1", "unschedulable": True}, id="driver-upgrade-cordoned"),
    ],
)
def test_nodes_that_accept_no_pod_for_now_are_counted_as_unready(spec: dict[str, Any]) -> None:
    """A run that was planned during an upgrade must not be told that it fits nowhere."""
    (pool,) = read_gpu_inventory([make_node(), make_node(**spec)], ResourcesSpec())
    assert (pool.nodes, pool.unready, pool.count_pods(1), pool.count_pods(1, ready=True)) == (2, 1, 2, 1)


def test_node_with_an_unhealthy_gpu_has_all_its_gpus_and_is_unready() -> None:
    (pool,) = read_gpu_inventory([make_node(gpus="7", capacity="8")], ResourcesSpec())
    assert (pool.gpus_per_node, pool.count_pods(8), pool.count_pods(8, ready=True)) == (8, 1, 0)


def test_partitions_that_the_device_plugin_does_not_advertise_now_are_counted_by_their_label() -> None:
    node = copy.deepcopy(MIXED)
    node["metadata"]["labels"][f"{MIG}.count"] = "2"
    node["status"]["allocatable"][MIG] = "0"
    (pool,) = read_gpu_inventory([node], ResourcesSpec(gpu_resource=MIG))
    assert (pool.gpus_per_node, pool.unready) == (2, 1)


def test_mig_gpus_are_not_counted_as_undivided_gpus() -> None:
    """The label of a node with the MIG strategy `mixed` counts all GPUs."""
    node = copy.deepcopy(MIXED)
    node["metadata"]["labels"]["nvidia.com/gpu.count"] = "5"
    tolerant = ResourcesSpec.model_validate({"tolerations": [{"key": MIG, "operator": "Exists"}]})
    (pool,) = read_gpu_inventory([node], tolerant)
    assert (pool.gpus_per_node, pool.unready) == (4, 0)


@pytest.mark.parametrize(
    ("node", "why"),
    [
        pytest.param(make_node(taints=[taint("team")]), "taint team, which", id="tainted"),
        pytest.param(make_node(allocatable={"memory": "15944120Ki"}), "15.2 GiB of host memory, and", id="memory"),
        pytest.param(make_node(allocatable={"cpu": "1930m"}), "1930m CPU, and spec.resources.cpu is 2", id="cpu"),
        pytest.param(make_node(replicas="4"), "time-sliced: its memory", id="time-sliced"),
        pytest.param(make_node(capability=(7, 0)), "sm_70, and the trainer has kernels from sm_75", id="too-old"),
    ],
)
def test_nodes_that_never_accept_the_pods_are_named_with_the_reason(node: dict[str, Any], why: str) -> None:
    assert read_gpu_inventory([node], ResourcesSpec()) == ()
    (found,) = find_unusable_nodes([node], ResourcesSpec())
    assert (found.product, found.why[: len(why)]) == ("NVIDIA-A10", why)
    assert find_unusable_nodes([node, make_node()], ResourcesSpec()) == ()


def test_node_selector_and_windows_are_named() -> None:
    resources = ResourcesSpec.model_validate({"nodeSelector": {"zone": "b"}})
    assert find_unusable_nodes([make_node()], resources) == (UnusableNodes("NVIDIA-A10", "no node with zone=b"),)
    windows = make_node()
    windows["metadata"]["labels"]["kubernetes.io/os"] = "windows"
    assert read_gpu_inventory([windows], ResourcesSpec()) == ()


def test_other_vendor_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory label may be in bytes, and its GPUs may have no compute capability."""
    row = Accelerator(
        "cuda", "example.com/gpu", frozenset(), "example.com/product", "example.com/memory", memory_unit=1
    )
    monkeypatch.setattr(gpu_inventory, "accelerator_of_resource", lambda _: row)
    labels = {"example.com/product": "Max-1100", "example.com/memory": str(48 << 30)}
    other = {"metadata": {"name": "x", "labels": labels}, "status": {"allocatable": {"example.com/gpu": "2"}}}
    pool = GpuPool("Max-1100", 48 << 30, 2, accelerator=row)
    assert read_gpu_inventory([make_node(), other], ResourcesSpec()) == (pool,)
    assert (pool.dtype("llama"), pool.partitioned) == ("bfloat16", False)


def test_amount_that_cannot_be_read_excludes_no_node() -> None:
    node = make_node(allocatable={"memory": "12345678901234m", "cpu": "many"})
    assert read_gpu_inventory([node], ResourcesSpec()) == (A10,)


@pytest.mark.parametrize(("quantity", "cores"), [("2", 2), ("0.5", 0.5), ("7910m", 7.91), ("1k", 1000)])
def test_cores_are_parsed(quantity: str, cores: float) -> None:
    assert parse_cores(quantity) == cores


TEAM = {"key": "team", "value": "b", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("taint", "tolerations", "offered"),
    [
        ({"key": "nvidia.com/gpu", "effect": "NoSchedule"}, [], True),
        ({"key": "full", "effect": "PreferNoSchedule"}, [], True),
        (TEAM, [{"key": "team", "value": "b"}], True),
        (TEAM, [{"key": "team", "value": "c"}], False),
        (TEAM, [{"key": "team", "operator": "Exists", "effect": "NoSchedule"}], True),
        (TEAM, [{"key": "team", "operator": "Exists", "effect": "NoExecute"}], False),
        (TEAM, [{"operator": "Exists"}], True),
        (TEAM, [{"value": "b"}], False),
    ],
)
def test_taints_are_tolerated_as_in_kubernetes(
    taint: dict[str, str], tolerations: list[dict[str, str]], offered: bool
) -> None:
    resources = ResourcesSpec.model_validate({"tolerations": tolerations})
    assert read_gpu_inventory([make_node(taints=[taint])], resources) == ((A10,) if offered else ())


@pytest.mark.parametrize(
    ("resources", "offered"),
    [
        ({"gpuProduct": "NVIDIA-A10"}, True),
        ({"gpuProduct": "Tesla-T4"}, False),
        ({"nodeSelector": {"zone": "a"}}, True),
        ({"nodeSelector": {"zone": "b"}}, False),
    ],
)
def test_node_selector_and_product_filter_nodes(resources: dict[str, Any], offered: bool) -> None:
    assert read_gpu_inventory([make_node()], ResourcesSpec.model_validate(resources)) == ((A10,) if offered else ())


@pytest.mark.parametrize(
    ("quantity", "size"),
    [("24Gi", 24 * GIBIBYTE), ("1.5Gi", 3 * GIBIBYTE // 2), ("80G", 80 * 10**9), ("15360Mi", 15 * GIBIBYTE), ("7", 7)],
)
def test_quantity_is_parsed(quantity: str, size: int) -> None:
    assert parse_quantity(quantity) == size


@pytest.mark.parametrize("quantity", ["24 Gi", "24GB", "", "-1Gi", "Gi"])
def test_invalid_quantity_raises(quantity: str) -> None:
    with pytest.raises(ValueError, match="write a number and a unit, as in 24Gi"):
        parse_quantity(quantity)


MIG: Final = "nvidia.com/mig-3g.40gb"
MIXED: Final = {
    "metadata": {
        "name": "mixed",
        "labels": {
            "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
            "nvidia.com/gpu.memory": "81920",
            "nvidia.com/gpu.compute.major": "8",
            "nvidia.com/gpu.compute.minor": "0",
            f"{MIG}.product": "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb",
            f"{MIG}.memory": "40192",
            f"{MIG}.replicas": "1",
        },
    },
    "spec": {"taints": [{"key": MIG, "effect": "NoSchedule"}, {"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    "status": {"allocatable": {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "4", MIG: "2"}},
}
"""A node of which four GPUs are undivided and one is two partitions, as the MIG strategy `mixed` advertises them."""


def test_partitions_of_a_mixed_node_are_gpus_of_their_own_resource() -> None:
    [pool] = read_gpu_inventory([MIXED], ResourcesSpec(gpu_resource=MIG))
    assert pool == GpuPool(
        "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", 40_192 << 20, 2, 1, (8, 0), accelerator_of_resource(MIG)
    )
    assert pool.partitioned
    assert read_gpu_inventory([MIXED], ResourcesSpec(gpu_resource="nvidia.com/mig-1g.10gb")) == ()


def test_undivided_gpus_of_a_mixed_node_are_kept_from_others_by_the_taint_of_its_partitions() -> None:
    assert read_gpu_inventory([MIXED], ResourcesSpec()) == ()
    tolerant = ResourcesSpec.model_validate({"tolerations": [{"key": MIG, "operator": "Exists"}]})
    [pool] = read_gpu_inventory([MIXED], tolerant)
    assert (pool.gpus_per_node, pool.memory) == (4, 81_920 << 20)


@pytest.mark.parametrize("change", [{"replicas": "4"}, {"memory": "much"}, {"product": "x", "memory": "0"}])
def test_labels_of_the_profile_decide(change: dict[str, str]) -> None:
    node = copy.deepcopy(MIXED)
    node["metadata"]["labels"] |= {f"{MIG}.{name}": value for name, value in change.items()}
    assert read_gpu_inventory([node], ResourcesSpec(gpu_resource=MIG)) == ()


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", 40),
        ("NVIDIA-A100-SXM4-40GB-MIG-1g.5gb", 5),
        ("nvidia.com/mig-1g.10gb.me", 10),
        ("NVIDIA-H100-80GB-HBM3", 80),
    ],
)
def test_memory_of_a_partition_is_not_that_of_its_gpu(name: str, gigabytes: int) -> None:
    assert memory_of_product(name) == gigabytes * 10**9


def test_product_name_has_memory() -> None:
    assert memory_of_product("NVIDIA-A100-SXM4-80GB") == 80 * 10**9
    assert memory_of_product("Tesla-T4") is None


def test_usable_memory_is_less_than_label() -> None:
    t4 = GpuPool("Tesla-T4", 15_360 << 20)
    assert 14.6 * GIBIBYTE < t4.usable <= 14.75 * GIBIBYTE
