"""Which nodes the pods of a run may use, and which they prefer."""

from collections.abc import Sequence
from typing import Any, Final

from qlora_api.accelerators import Accelerator, accelerator_of_resource
from qlora_api.v1alpha1 import Plan, QLoRAJobSpec, ResourcesSpec, Toleration
from qlora_operator.models import AttemptInputs, Manifest

UNREACHABLE_SECONDS: Final = 60
"""tolerationSeconds of the pods of a node that became unreachable (50 s without a kubelet heartbeat): the other pods of
the run wait for them and hold their GPUs. Kubernetes' default is 300 s."""
_NODE_FAILURE_TOLERATIONS: Final = tuple(
    {
        "key": f"node.kubernetes.io/{state}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": UNREACHABLE_SECONDS,
    }
    for state in ("not-ready", "unreachable")
)
_PLATFORM_LABELS: Final = frozenset({"kubernetes.io/arch", "kubernetes.io/os"})
"""Node labels that decide whether an image can run."""
_OTHER_NODE_WEIGHT: Final = 100
"""Weight of a node on which no attempt failed: Kubernetes' maximum."""
_SMALLEST_GPU_WEIGHT: Final = 50
"""Weight of the smallest GPU; a larger one on which no attempt failed is preferred to it."""
_SAME_PRODUCT_WEIGHT: Final = 50
"""Weight of the GPU product of the other pods of a run, all of which are as slow as the slowest."""


def build_train_placement(resources: ResourcesSpec, plan: Plan) -> dict[str, Any]:
    """Return node selector and tolerations of a training pod."""
    accelerator = accelerator_of_resource(resources.gpu_resource)
    # A plan of a version before gpuProducts names one product.
    product = resources.gpu_product or (plan.gpu_product if plan.gpu_products is None else None)
    selector = {**resources.node_selector, **({accelerator.product_label: product} if product else {})}
    gpu_taints = [{"key": taint, "operator": "Exists"} for taint in sorted(accelerator.taints)]
    return {
        **({"nodeSelector": selector} if selector else {}),
        "tolerations": [
            *(_toleration(toleration) for toleration in resources.tolerations if toleration.key),
            *(gpu_taints if plan.gpus_per_node else []),
            *_NODE_FAILURE_TOLERATIONS,
            # The first match decides on the eviction; one without a key matches the taints of a failed node too.
            *(_toleration(toleration) for toleration in resources.tolerations if not toleration.key),
        ],
    }


def build_prepare_placement(resources: ResourcesSpec) -> dict[str, Any]:
    """Return node selector and tolerations of a prepare pod.

    It may run wherever the run may, and leaves a dead node as soon. It need not run there: a selector of GPU nodes
    would have an autoscaler add one before anything is checked. What the image needs is selected (docs/decisions).
    """
    selector = {label: value for label, value in resources.node_selector.items() if label in _PLATFORM_LABELS}
    keyless = [toleration for toleration in resources.tolerations if not toleration.key]
    return {
        **({"nodeSelector": selector} if selector else {}),
        "tolerations": [
            *(_toleration(toleration) for toleration in resources.tolerations if toleration.key),
            *_NODE_FAILURE_TOLERATIONS,
            # The first match decides on the eviction; one without a key matches the taints of a failed node too.
            *map(_toleration, keyless),
        ],
    }


def _toleration(toleration: Toleration) -> dict[str, Any]:
    return toleration.model_dump(by_alias=True, exclude_none=True)


def build_train_affinity(spec: QLoRAJobSpec, run: AttemptInputs, labels: dict[str, str]) -> Manifest:
    """Return the affinity of the pods of a training attempt; empty if they may run anywhere.

    Args:
        spec: The spec.
        run: The attempt, with its plan and the nodes that it avoids.
        labels: The labels of its pods.

    """
    node_affinity = _build_node_affinity(spec, run)
    pod_affinity = _build_pod_affinity(spec.resources, run.plan, labels) if run.plan.nodes > 1 else {}
    return {**({"nodeAffinity": node_affinity} if node_affinity else {}), **pod_affinity}


def build_prepare_affinity(avoided_nodes: tuple[str, ...]) -> Manifest:
    """Return the affinity of a prepare pod, which prefers other nodes to those that are avoided."""
    if not avoided_nodes:
        return {}
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": _prefer_others(avoided_nodes)}}


def _build_node_affinity(spec: QLoRAJobSpec, run: AttemptInputs) -> Manifest:
    """Return the node affinity: GPUs that fit, without the avoided nodes; nodes that may be at fault come last."""
    terms = (gpus | _other_nodes_than(run.avoided_nodes) for gpus in _require_gpus(spec, run.plan))
    required = [term for term in terms if term]
    disliked = tuple(node for node in run.disliked_nodes if node not in run.avoided_nodes)
    label = accelerator_of_resource(spec.resources.gpu_resource).product_label
    preferred = [*_prefer_small_gpus(run.plan, label), *_prefer_others(disliked)]
    return {
        **({"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": required}} if required else {}),
        **({"preferredDuringSchedulingIgnoredDuringExecution": preferred} if preferred else {}),
    }


def _require_gpus(spec: QLoRAJobSpec, plan: Plan) -> list[Manifest]:
    """Return alternatives of what the labels of a node must say about its GPUs, so that they are not too small."""
    accelerator, products = accelerator_of_resource(spec.resources.gpu_resource), list(plan.gpu_products or ())
    product = {"key": accelerator.product_label, "operator": "In", "values": products}
    # Gt has no equality; the label has whole units.
    least = str((plan.min_gpu_memory or 0) // accelerator.memory_unit - 1)
    memory = {"key": accelerator.memory_label, "operator": "Gt", "values": [least]}
    expressions = [
        *([product] if products and not spec.resources.gpu_product else []),
        *([memory] if plan.min_gpu_memory else []),
    ]
    exclusive = _exclude_shared_gpus(accelerator) if plan.gpus_per_node > 1 and not products else [[]]
    return [
        {"matchExpressions": [*expressions, *alternative]} if expressions or alternative else {}
        for alternative in exclusive
    ]


def _exclude_shared_gpus(accelerator: Accelerator) -> list[list[Manifest]]:
    """Return alternatives that exclude time-sliced GPUs: several of a pod may be one GPU, which NCCL refuses."""
    label = accelerator.replicas_label
    if not label:
        return [[]]
    return [
        [{"key": label, "operator": "DoesNotExist"}],
        [{"key": label, "operator": "In", "values": ["0", "1"]}],
    ]


def _prefer_small_gpus(plan: Plan, label: str) -> list[Manifest]:
    """Return preferences with falling weights, so that large GPUs are left to the runs that need them."""
    products = plan.gpu_products or ()
    return [
        {
            "weight": max(_SMALLEST_GPU_WEIGHT * (len(products) - 1 - index) // (len(products) - 1), 1),
            "preference": {"matchExpressions": [{"key": label, "operator": "In", "values": [product]}]},
        }
        for index, product in enumerate(products[:-1])
    ]


def _prefer_others(nodes: tuple[str, ...]) -> list[Manifest]:
    return [{"weight": _OTHER_NODE_WEIGHT, "preference": _other_nodes_than(nodes)}] if nodes else []


def _other_nodes_than(nodes: tuple[str, ...]) -> Manifest:
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    return {"matchFields": fields} if fields else {}


def replace_avoided_nodes(terms: Sequence[Manifest], nodes: Sequence[str]) -> list[Manifest]:
    """Return the alternatives of a node affinity with other avoided nodes; empty if the pods may run anywhere."""
    replaced = []
    for term in terms or ({},):
        kept = [field for field in term.get("matchFields") or () if field.get("operator") != "NotIn"]
        fields = [*kept, *_other_nodes_than(tuple(nodes)).get("matchFields", ())]
        others = {name: value for name, value in term.items() if name != "matchFields"}
        replaced.append({**others, **({"matchFields": fields} if fields else {})})
    return replaced if all(replaced) else []  # an empty alternative would match no node


def _build_pod_affinity(resources: ResourcesSpec, plan: Plan, labels: dict[str, str]) -> Manifest:
    """Prefer one node per pod, since two on one would share its network and cores; and one GPU product for all.

    Neither is required: a gang whose first pod chose a product without room for the others would wait for ever.
    """
    affinity = {"podAntiAffinity": _prefer_pods(labels, "kubernetes.io/hostname", _OTHER_NODE_WEIGHT)}
    if len(plan.gpu_products or ()) > 1:
        label = accelerator_of_resource(resources.gpu_resource).product_label
        affinity["podAffinity"] = _prefer_pods(labels, label, _SAME_PRODUCT_WEIGHT)
    return affinity


def _prefer_pods(labels: dict[str, str], topology_key: str, weight: int) -> Manifest:
    term = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": topology_key}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": weight, "podAffinityTerm": term}]}
